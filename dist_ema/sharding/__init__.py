"""Where the elements of a full tensor lie, who keeps an average of them, and who writes them."""

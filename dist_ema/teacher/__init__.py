"""A second model that holds the average: a teacher (``into=``), sharded as the averaged model or gathered for it."""

"""DeepSpeed: ZeRO-0 to 3, with and without fp32 masters, and frozen parts of a model that is not trained."""

"""Which layouts a number of devices allows a model, what each needs and how long a step is expected to take. No torch."""

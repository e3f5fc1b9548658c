"""Search of parallel layouts: the legal ones, estimates of memory and step time, figures of devices. No torch."""

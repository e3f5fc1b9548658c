"""Plans of a whole job in one process: every rank's boxes, and its memory."""

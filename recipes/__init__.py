"""Programs that use megabridge, one per file, meant to be read from top to bottom and copied. The package never imports them."""

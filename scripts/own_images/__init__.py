"""Plan, commands and report of scripts/own_images.sh."""

"""What a run needs and what bounds its speed, from programs compiled without the hardware."""

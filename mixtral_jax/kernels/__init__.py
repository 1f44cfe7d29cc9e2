"""One function per heavy operation; the backend is named, never swapped silently."""

"""What runs inside Flower's processes: the only part of the project that clients are sent."""

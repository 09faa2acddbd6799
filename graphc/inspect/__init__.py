"""What an executable tells about itself: kernels, memory, explanations, profiles, a dump."""

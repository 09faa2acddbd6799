"""What is needed to run a compiled program: kernel cache, linker, thread team, driver, arenas.

Nothing here imports Numba while every kernel comes from the cache: importing it costs more than
linking a whole network does.
"""

"""Graph transformations: each pass is a function from a valid graph to a valid graph.

The parts of the pipeline live one to a module, named by its verb; `passes.pipeline` says the order.
"""

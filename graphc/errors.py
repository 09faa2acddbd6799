"""Every error a user can meet.

Each message names the node, the operands with their shapes, and the fix.
"""


class GraphcError(Exception):
    """Base class of all graphc errors."""


class DeclarationError(GraphcError, ValueError):
    """A line of the user's network cannot be declared: raised where that line runs."""


class ShapeError(DeclarationError):
    """Operand shapes do not fit the operator."""


class DTypeError(DeclarationError, TypeError):
    """Operand element types do not fit the operator."""


class NameLookupError(GraphcError, KeyError):
    """A name that the graph does not have."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnboundDimensionError(GraphcError, ValueError):
    """A symbolic dimension has no value at compile time."""


class GradientError(GraphcError, ValueError):
    """A gradient that does not exist was asked for."""


class CompileError(GraphcError):
    """The graph cannot be compiled for the target; lists every node that stands in the way."""


class InputError(GraphcError, ValueError):
    """An array given to an executable does not fit the input it is for."""


class StateError(GraphcError, ValueError):
    """A state dictionary does not fit the executable's parameters."""


class DataError(GraphcError, ValueError):
    """A data or weight file is damaged, truncated or of another format."""


class CheckError(GraphcError, AssertionError):
    """`compile(..., check=True)` found a node whose kernel differs from the interpreter."""


class CacheError(GraphcError, OSError):
    """The kernel cache cannot be trusted or used."""


class DeviceError(GraphcError, RuntimeError):
    """There is no GPU to run on, or the GPU or its driver refuses."""


class MissingExtraError(GraphcError, ImportError):
    """An optional library is needed and not installed; the message names the extra to install."""

# ansible-core has no types: what it gives is Any. Its module_utils hold our package, which has.
from typing import Any

def __getattr__(name: str) -> Any: ...

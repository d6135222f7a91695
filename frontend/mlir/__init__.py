"""Export as MLIR: torch layers lowered to linalg by torch-mlir, put together as one module (see docs/mlir.md)."""

"""Every pass, the default pipeline and the other simplifiers over onnx.backend.test; see docs/conformance.md."""

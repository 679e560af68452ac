"""ONNX side: the operator's schema and function body, export of Hugging Face models, rewriting of foreign graphs."""

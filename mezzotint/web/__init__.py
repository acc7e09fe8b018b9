"""A bundle as a web page that samples in the browser, with onnxruntime-web."""

"""Running a function on lazy weights: the algebra of products, the interpreter of jaxprs, `lift` and `sites`."""

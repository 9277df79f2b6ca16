"""One pass over memory each: the row kernels behind dispatch and experts, as torch custom ops."""

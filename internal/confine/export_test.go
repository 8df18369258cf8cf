package confine

import "unsafe"

// ptr is the address of a value, for a system call.
func ptr[T any](v *T) unsafe.Pointer { return unsafe.Pointer(v) }

//go:build !amd64

package qemu

// counterKHz is of a processor that the guest does not have.
func counterKHz() int64 { return 0 }

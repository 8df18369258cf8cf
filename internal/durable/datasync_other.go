//go:build !linux

package durable

import "os"

// Datasync puts the content of f on the disk.
func Datasync(f *os.File) error { return f.Sync() }

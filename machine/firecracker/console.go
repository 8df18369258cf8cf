package firecracker

import (
	"os"

	"cal/machine/microvm"
)

// pipe is one of a jail's, and the end of what came through it.
type pipe struct {
	file *os.File
	microvm.Tape
}

// record reads until the pipe is closed.
func (p *pipe) record() { p.Record(p.file) }

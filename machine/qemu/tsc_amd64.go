package qemu

import (
	"sync"
	"time"
)

// timestamp reads the processor's time stamp counter.
func timestamp() uint64

// counterKHz is how many thousand times a second the time stamp counter of this
// processor counts; 0 where that cannot be told. An emulated processor shows the host's counter, and a
// kernel that has to find out by an emulated timer fails on a busy host, and then stands
// still for ever.
var counterKHz = sync.OnceValue(func() int64 {
	const samples, length = 5, 2 * time.Millisecond
	var best int64
	for range samples {
		began, first := time.Now(), timestamp()
		for time.Since(began) < length {
		}
		last, took := timestamp(), time.Since(began)
		if khz := int64(last-first) * int64(time.Millisecond) / int64(took); best == 0 || khz < best {
			best = khz // a sample that was interrupted counts too much
		}
	}
	return best
})

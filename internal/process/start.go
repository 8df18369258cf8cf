package process

import (
	"errors"
	"math/rand/v2"
	"runtime"

	"golang.org/x/sys/unix"
)

// StartOn starts a program by start, on n processors; 0: on all. Affinity passes to a child
// from the thread that starts it, so a thread takes it on that ends with that.
func StartOn(start func() error, n int) error {
	if n == 0 {
		return start()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for ever
		few, err := someProcessors(n)
		if err = errors.Join(err, unix.SchedSetaffinity(0, &few)); err == nil {
			err = start()
		}
		done <- err
	}()
	return <-done
}

// someProcessors returns n of the processors that this thread may use, other
// ones each time, or all where there are no more than n.
func someProcessors(n int) (set unix.CPUSet, err error) {
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return set, err
	}
	var list []int
	for cpu := range len(allowed) * 64 {
		if allowed.IsSet(cpu) {
			list = append(list, cpu)
		}
	}
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] }) //nolint:gosec // spreads load, hides nothing
	for _, cpu := range list[:min(n, len(list))] {
		set.Set(cpu)
	}
	return set, nil
}

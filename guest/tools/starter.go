package tools

import (
	"os"
	"runtime"
)

// starter starts programs.
type starter func(binary string, argv []string, attr *os.ProcAttr) (*os.Process, error)

// confined returns a starter of programs that are confined as a thread is on which confine was called;
// stop ends it. What confines a thread passes to what that thread starts. All are started by one:
// confined by two threads, two programs could not look at one another, as a debugger must, nor could
// this one at them.
func confined(confine func() error) (start starter, stop func(), err error) {
	if confine == nil {
		return os.StartProcess, func() {}, nil
	}
	type job struct {
		do   func()
		done chan struct{}
	}
	jobs := make(chan job)
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this function
		err := confine()
		ready <- err
		if err != nil {
			return
		}
		for j := range jobs {
			j.do()
			close(j.done)
		}
	}()
	if err := <-ready; err != nil {
		return nil, nil, err
	}
	return func(binary string, argv []string, attr *os.ProcAttr) (process *os.Process, err error) {
		done := make(chan struct{})
		jobs <- job{func() { process, err = os.StartProcess(binary, argv, attr) }, done}
		<-done
		return process, err
	}, func() { close(jobs) }, nil
}

package guest

import (
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/term"
)

// forwardSignals passes the signals that end or interrupt a program on to pid.
func forwardSignals(pid int) (stop func()) {
	ch := make(chan os.Signal, 8)
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGWINCH)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for s := range ch {
			// On a terminal the kernel has told the whole group already.
			if s != syscall.SIGWINCH && s != syscall.SIGINT && s != syscall.SIGQUIT || !term.IsTerminal(0) {
				syscall.Kill(pid, s.(syscall.Signal))
			}
		}
	}()
	return func() {
		signal.Stop(ch)
		close(ch)
		<-done
	}
}

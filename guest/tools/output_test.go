package tools

import (
	"io"
	"testing"
	"testing/synctest"
)

// A command that takes no input holds its sender back; when it ends, the sender
// goes on.
func TestInletHoldsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, release := range map[string]func(in *inlet){
			"read":  func(in *inlet) { io.ReadFull(in, make([]byte, 10)) },
			"close": func(in *inlet) { in.Close() },
		} {
			in := newInlet()
			in.put(make([]byte, inletCap))
			went := false
			go func() {
				in.put([]byte("more"))
				went = true
			}()
			synctest.Wait()
			if went {
				t.Errorf("%s: more than %d bytes were taken at once", name, inletCap)
			}
			release(in)
			synctest.Wait()
			if !went {
				t.Errorf("%s: the sender is still held back", name)
			}
		}
	})
}

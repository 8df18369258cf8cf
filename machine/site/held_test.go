package site

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/internal/durable"
	"cal/machine"
	"cal/nucleus"
)

// standIn is a machine without anything that runs. Clearing ends it.
type standIn struct {
	*Held
	mu      sync.Mutex
	cleared int
	left    int
	stuck   error // of clear
	deaf    error // of Rewire
}

const driver = "stand-in"

func (s *standIn) clear(ctx context.Context, dir string) error {
	if err := errors.Join(ctx.Err(), s.stuck); err != nil {
		return err
	}
	s.mu.Lock()
	s.cleared++
	s.mu.Unlock()
	if s.Held != nil {
		s.Died("killed")
	}
	return errors.Join(Delete(dir, "made"), DeleteRecord(dir))
}

func (s *standIn) letGo() { s.left++ }

func (s *standIn) Rewire(context.Context) (net.Conn, error) {
	if err := errors.Join(s.Alive(nil), s.deaf); err != nil {
		return nil, err
	}
	ours, theirs := net.Pipe()
	theirs.Close()
	return ours, nil
}

func (s *standIn) Facts() machine.Facts         { return machine.Facts{} }
func (s *standIn) Limits() []nucleus.Limit      { return nil }
func (s *standIn) Resume(context.Context) error { return nil }
func (s *standIn) Console() string              { return "" }

// start makes a machine of dir, up to where failed says.
func (s *standIn) start(dir string, failed error) func(io.Closer) (*standIn, error) {
	return func(lock io.Closer) (*standIn, error) {
		err := errors.Join(
			durable.Store(filepath.Join(dir, RecordFile), map[string]string{"driver": driver}),
			os.Mkdir(filepath.Join(dir, "made"), 0o700), failed)
		if err == nil {
			s.Held = Hold(dir, lock, s.clear, s.letGo)
		}
		return s, err
	}
}

func create(t *testing.T, s *standIn) (dir string, m machine.Machine) {
	t.Helper()
	dir = t.TempDir()
	m, err := Create(t.Context(), dir, s.clear, s.start(dir, nil))
	must(t, err)
	return dir, m
}

type record struct {
	Driver string `json:"driver"`
}

func load(dir string) (rec record, err error) { return rec, LoadRecord(dir, driver, &rec) }

func TestCreate(t *testing.T) {
	t.Run("fails", func(t *testing.T) {
		dir, s := t.TempDir(), &standIn{}
		ctx, cancel := context.WithCancel(t.Context())
		m, err := Create(ctx, dir, s.clear, func(lock io.Closer) (*standIn, error) {
			cancel() // what ends the start does not end the cleaning up
			return s.start(dir, io.ErrUnexpectedEOF)(lock)
		})
		if m != nil || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%v, %v", m, err)
		}
		if left := names(t, dir); len(left) > 0 || s.cleared != 1 {
			t.Errorf("left %q, cleared %d times", left, s.cleared)
		}
		_, err = Create(t.Context(), dir, s.clear, s.start(dir, nil)) // control
		must(t, err)
	})
	t.Run("cannot be cleaned up", func(t *testing.T) {
		dir, s := t.TempDir(), &standIn{stuck: io.ErrNoProgress}
		_, err := Create(t.Context(), dir, s.clear, s.start(dir, io.ErrUnexpectedEOF))
		if !errors.Is(err, io.ErrUnexpectedEOF) || !errors.Is(err, io.ErrNoProgress) {
			t.Errorf("%v, want both errors", err)
		}
		if left := names(t, dir); !slices.Contains(left, RecordFile) {
			t.Errorf("left %q, want the record of what is still there", left)
		}
	})
	t.Run("used", func(t *testing.T) {
		s := &standIn{}
		dir, _ := create(t, s)
		_, err := Create(t.Context(), dir, s.clear, func(io.Closer) (*standIn, error) {
			t.Error("a second machine was begun")
			return nil, nil
		})
		if !errors.Is(err, machine.ErrRefused) || s.cleared != 0 {
			t.Errorf("%v, and cleared %d times", err, s.cleared)
		}
	})
	t.Run("at once", func(t *testing.T) {
		dir, s, began := t.TempDir(), &standIn{}, make(chan struct{})
		var first sync.WaitGroup
		first.Go(func() {
			_, err := Create(t.Context(), dir, s.clear, func(lock io.Closer) (*standIn, error) {
				close(began)
				return s.start(dir, nil)(lock)
			})
			if err != nil {
				t.Error(err)
			}
		})
		defer first.Wait()
		<-began
		if _, err := Create(soon(t), dir, s.clear, s.start(dir, nil)); err == nil {
			t.Error("two machines in one directory")
		}
	})
}

func TestAdopt(t *testing.T) {
	find := func(s *standIn, dir string) func(record, io.Closer) (*standIn, error) {
		return func(_ record, lock io.Closer) (*standIn, error) {
			s.Held = Hold(dir, lock, s.clear, s.letGo)
			return s, nil
		}
	}
	dir, first := create(t, &standIn{})
	if _, err := Adopt(soon(t), dir, load, find(&standIn{}, dir)); !errors.Is(err, durable.ErrLocked) {
		t.Errorf("adopted while another holds it: %v", err)
	}
	first.Release()
	deaf := &standIn{deaf: io.ErrClosedPipe}
	if _, err := Adopt(t.Context(), dir, load, find(deaf, dir)); !errors.Is(err, io.ErrClosedPipe) || deaf.left != 1 || deaf.cleared != 0 {
		t.Errorf("no new wire: %v, let go %d times, cleared %d times", err, deaf.left, deaf.cleared)
	}
	second, err := Adopt(t.Context(), dir, load, find(&standIn{}, dir)) // the lock is free again
	must(t, err)
	if second.Wire() == nil || second.Wire() != nil {
		t.Error("the wire of an adopted machine is not there once")
	}

	empty := t.TempDir()
	if _, err := Adopt(t.Context(), empty, load, find(&standIn{}, empty)); !errors.Is(err, machine.ErrGone) || len(names(t, empty)) > 0 {
		t.Errorf("no machine: %v, left %q", err, names(t, empty))
	}
	must(t, durable.Store(filepath.Join(empty, RecordFile), map[string]any{"driver": "another", "more": 1}))
	if _, err := Adopt(t.Context(), empty, load, find(&standIn{}, empty)); !errors.Is(err, machine.ErrForeign) {
		t.Errorf("another driver's: %v", err)
	}
}

func TestLoadRecord(t *testing.T) {
	for content, good := range map[string]bool{
		`{"driver":"stand-in"}`: true, `{"driver":"stand-in","more":1}`: false, `{}`: false, `{"driver":""}`: false, "": false, "{": false, "null": false, "[1]": false,
	} {
		dir := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dir, RecordFile), []byte(content), 0o600))
		if _, err := load(dir); (err == nil) != good || errors.Is(err, machine.ErrForeign) || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("record %q: %v", content, err)
		}
	}
}

func TestDestroy(t *testing.T) {
	s := &standIn{stuck: io.ErrNoProgress}
	dir, m := create(t, s)
	ours, theirs := net.Pipe()
	s.Give(ours)
	must(t, s.Alive(nil))
	if err := m.Destroy(t.Context()); !errors.Is(err, io.ErrNoProgress) || s.left != 0 || !used(dir) {
		t.Errorf("what cannot be removed: %v", err)
	}
	s.stuck = nil
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			if err := m.Destroy(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	<-m.Done()
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) || s.left != 1 {
		t.Errorf("directory: %v; let go %d times, want once", err, s.left)
	}
	if m.Reason() != "destroyed" || !errors.Is(s.Alive(nil), machine.ErrGone) {
		t.Errorf("reason %q, alive %v", m.Reason(), s.Alive(nil))
	}
	if _, err := theirs.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a wire that nobody took: %v, want its end", err)
	}
}

func TestDeath(t *testing.T) {
	s := &standIn{}
	dir, m := create(t, s)
	s.Died("it broke")
	s.Died("again")
	<-m.Done()
	if err := s.Alive(func() error { t.Error("called for a dead machine"); return nil }); !errors.Is(err, machine.ErrGone) || m.Reason() != "it broke" {
		t.Errorf("%v, reason %q", err, m.Reason())
	}
	must(t, os.WriteFile(filepath.Join(dir, "its owner's"), nil, 0o600))
	must(t, m.Destroy(t.Context()))
	if left := names(t, dir); !slices.Equal(left, []string{"its owner's"}) || m.Reason() != "it broke" {
		t.Errorf("left %q, reason %q", left, m.Reason())
	}
}

func TestRelease(t *testing.T) {
	s := &standIn{}
	dir, m := create(t, s)
	m.Release()
	m.Release()
	must(t, m.Destroy(t.Context()))
	if !used(dir) || s.left != 1 || s.cleared != 0 || !errors.Is(s.Alive(nil), machine.ErrGone) {
		t.Errorf("record there: %v, let go %d times, cleared %d times, alive %v", used(dir), s.left, s.cleared, s.Alive(nil))
	}
	lock, err := Lock(t.Context(), dir)
	must(t, err)
	lock.Close()
}

func TestRemove(t *testing.T) {
	s := &standIn{}
	dir, m := create(t, s)
	if err := Remove(soon(t), dir, s.clear); !errors.Is(err, durable.ErrLocked) || !used(dir) {
		t.Errorf("removed while it is held: %v", err)
	}
	m.Release()
	s = &standIn{stuck: io.ErrNoProgress}
	if err := Remove(t.Context(), dir, s.clear); !errors.Is(err, io.ErrNoProgress) || !used(dir) {
		t.Errorf("what cannot be cleared: %v", err)
	}
	s.stuck = nil
	must(t, Remove(t.Context(), dir, s.clear))
	must(t, Remove(t.Context(), dir, s.clear))
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) || s.cleared != 1 {
		t.Errorf("%v, cleared %d times", err, s.cleared)
	}
}

func TestStartContext(t *testing.T) {
	ctx, cancel := StartContext(t.Context())
	defer cancel()
	if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) > StartTimeout {
		t.Errorf("deadline %v %v", deadline, ok)
	}
	long, stop := context.WithTimeout(t.Context(), time.Hour)
	defer stop()
	ctx, cancel = StartContext(long)
	defer cancel()
	if deadline, _ := ctx.Deadline(); time.Until(deadline) < StartTimeout {
		t.Errorf("a caller's deadline of an hour became %v", deadline)
	}
}

// What a mount in a machine's directory shows is not the machine's.
func TestDeleteLeavesMounts(t *testing.T) {
	dir, shown := t.TempDir(), t.TempDir()
	at := filepath.Join(dir, "made", "a b")
	must(t, os.MkdirAll(at, 0o700))
	must(t, os.WriteFile(filepath.Join(shown, "precious"), nil, 0o600))
	if err := unix.Mount(shown, at, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("no mount can be made here: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
	if got := names(t, at); !slices.Equal(got, []string{"precious"}) { // control
		t.Fatalf("the mount shows %q", got)
	}
	must(t, Delete(dir, "made"))
	if got := names(t, shown); !slices.Equal(got, []string{"precious"}) {
		t.Errorf("what was mounted holds %q", got)
	}
	if got := names(t, dir); len(got) > 0 {
		t.Errorf("left %q", got)
	}
}

// soon is for a lock that somebody keeps.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

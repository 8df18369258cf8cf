package kvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cal/machine"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

// TestProbe wants one of two clear answers within the deadline, whatever this host is.
func TestProbe(t *testing.T) {
	var host Host
	began := time.Now()
	err := host.Probe(t.Context())
	t.Logf("%s after %s: %v", Device, time.Since(began), err)
	var failed *machine.ProbeError
	if err != nil && (!errors.As(err, &failed) || failed.Cause == "" || failed.Mend == "") {
		t.Errorf("%#v is no ProbeError with cause and mend", err)
	}
	if took := time.Since(began); took > patience+2*time.Second {
		t.Errorf("the probe took %s", took)
	}
	if errors.Is(err, errHangs) {
		began = time.Now()
		if again := host.Probe(t.Context()); again != err || time.Since(began) > patience/2 {
			t.Errorf("a guest that hung was started again: %v after %s", again, time.Since(began))
		}
	}
}

// asNobody does it in a thread that may open what anybody may.
func asNobody(do func() error) func() error {
	return func() error {
		if os.Geteuid() != 0 {
			return do()
		}
		result := make(chan error)
		go func() {
			runtime.LockOSThread() // never unlocked: the user goes with the thread
			err := unix.Setfsuid(65534)
			if err == nil {
				err = do()
			}
			result <- err
		}()
		return <-result
	}
}

// TestAnswers gives the probe hosts that lie, hang, or have nothing.
func TestAnswers(t *testing.T) {
	dir := t.TempDir()
	device := filepath.Join(dir, "kvm")
	if err := os.WriteFile(device, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	program := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, dir := range []string{dir, filepath.Dir(dir)} { // that it is closed is the file's doing
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	closed := filepath.Join(dir, "closed")
	if err := os.WriteFile(closed, nil, 0); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, self, device, want string
	}{
		{"a guest that ran", program("ok", "echo "+ran), device, ""},
		{"another program", program("other", "echo hello"), device, `said "hello"`},
		{"says it ran, and fails", program("liar", "echo "+ran+"; exit 1"), device, "runs no guest"},
		{"no guest", program("none", "echo its first instructions ended; exit 1"), device, "runs no guest: its first instructions ended"},
		{"a guest that hangs", program("hang", "while :; do :; done"), device, "did not end within"},
		{"no device", program("unused", "echo "+ran), filepath.Join(dir, "absent"), "there is no"},
		{"a file for a device", "/proc/self/exe", device, "runs no guest"},
		{"no right", program("unused2", "echo "+ran), closed, "may not be opened"},
	} {
		t.Run(c.name, func(t *testing.T) {
			try := func() error { return probe(context.Background(), c.self, c.device, 300*time.Millisecond) }
			if c.device == closed {
				try = asNobody(try)
			}
			err := try()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// TestAdmit: what is said to do can be done; a group is named that is there and may use the device.
func TestAdmit(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("gives files to groups; run as root")
	}
	device := filepath.Join(t.TempDir(), "kvm")
	if err := os.WriteFile(device, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		mode os.FileMode
		gid  int
		want string
	}{
		{0o660, 1, "usermod -aG daemon "}, // Debian's first group
		{0o600, 1, "chmod 0666"},
		{0o660, 0, "chmod 0666"},
		{0o660, 54321, "chmod 0666"}, // nobody knows its name
	} {
		if err := errors.Join(os.Chown(device, 0, c.gid), os.Chmod(device, c.mode)); err != nil {
			t.Fatal(err)
		}
		if got := admit(device); !strings.Contains(got, c.want) {
			t.Errorf("mode %o of group %d: %q, want %q", c.mode, c.gid, got, c.want)
		}
	}
}

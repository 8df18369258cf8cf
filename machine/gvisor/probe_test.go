package gvisor

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"cal/machine"
)

func TestProbe(t *testing.T) {
	b := need(t)
	scratch := t.TempDir()
	roots, err := os.MkdirTemp("", "cal-roots-") // of its own: other tests' nodes probe at the same time
	must(t, err)
	defer os.RemoveAll(roots)
	must(t, os.Chmod(roots, 0o711))
	must(t, New(Config{Runsc: b.runsc, Scratch: scratch, Roots: roots, Patience: time.Minute}).Probe(t.Context()))
	if entries, err := os.ReadDir(scratch); err != nil || len(entries) != 0 {
		t.Errorf("left: %v %v", entries, err)
	}
	if found, err := os.ReadDir(roots); err != nil || len(found) != 0 {
		t.Errorf("left: %v %v", found, err)
	}
}

// program makes a stand-in for runsc that does what no good runsc does.
func program(t *testing.T, script string) string {
	path := filepath.Join(t.TempDir(), "runsc")
	must(t, os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755))
	return path
}

const rightVersion = `[ "$1" = --version ] && echo "runsc version ` + Version + `" && exit; `

func TestProbeTellsCauses(t *testing.T) {
	locked := program(t, "exit 0")
	must(t, os.Chmod(locked, 0o644))
	for name, test := range map[string]struct{ runsc, cause, mend string }{
		"missing":        {"/nonexistent/runsc", `runsc is not at "/nonexistent/runsc"`, "make"},
		"not named":      {"", "runsc is not at", "make"},
		"may not run":    {locked, "may not be executed", "chmod 755"},
		"another":        {program(t, "echo 'runsc version release-20230101.0'"), `version "release-20230101.0", wanted "` + Version, "make"},
		"no version":     {program(t, "echo 'runsc version VERSION_MISSING'"), "VERSION_MISSING", "make"},
		"broken":         {program(t, "echo boom >&2; exit 3"), "boom", "make"},
		"silent guest":   {program(t, rightVersion+"exit 0"), "runs no guest", "doctor"},
		"another kernel": {program(t, rightVersion+"echo 'cal-probe: Linux version 6.1.0-debian'"), "runs no guest", "doctor"},
	} {
		t.Run(name, func(t *testing.T) {
			err := New(Config{Runsc: test.runsc, Patience: time.Minute}).Probe(t.Context())
			var cause *machine.ProbeError
			if !errors.As(err, &cause) || !strings.Contains(err.Error(), test.cause) || !strings.Contains(cause.Mend, test.mend) {
				t.Errorf("got %v (%+v)", err, cause)
			}
		})
	}
}

// TestProbeHangs: a runsc that starts something and never answers is killed with it.
func TestProbeHangs(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	runsc := program(t, rightVersion+`echo $$ >`+pidFile+`; while :; do :; done`)
	began := time.Now()
	err := New(Config{Runsc: runsc, Patience: time.Second}).Probe(t.Context())
	if err == nil || !strings.Contains(err.Error(), "did not answer") {
		t.Errorf("got %v", err)
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("the probe took %s", took)
	}
	pid, err := os.ReadFile(pidFile)
	must(t, err)
	if _, err := os.Stat("/proc/" + strings.TrimSpace(string(pid))); !os.IsNotExist(err) {
		t.Errorf("the hanging program still runs: %v", err)
	}
}

func TestDiagnose(t *testing.T) {
	for name, test := range map[string]struct {
		files    map[string]string
		ordinary bool
		output   string
		want     string
	}{
		"namespaces off":         {map[string]string{"sys/user/max_user_namespaces": "0\n"}, true, "", "max_user_namespaces is 0"},
		"Debian's switch":        {map[string]string{"sys/kernel/unprivileged_userns_clone": "0\n"}, true, "", "unprivileged_userns_clone is 0"},
		"the switch, as root":    {map[string]string{"sys/kernel/unprivileged_userns_clone": "0\n"}, false, "", "runs no guest"},
		"AppArmor":               {map[string]string{"sys/kernel/apparmor_restrict_unprivileged_userns": "1"}, true, "", "AppArmor"},
		"AppArmor does not":      {map[string]string{"sys/kernel/apparmor_restrict_unprivileged_userns": "0"}, true, "", "runs no guest"},
		"container with seccomp": {map[string]string{"self/status": "Name:\tx\nSeccomp:\t2\n"}, false, "unshare: operation not permitted", "seccomp filter"},
		"container":              {map[string]string{"self/status": "Seccomp:\t0\n"}, false, "mount: operation not permitted", "may not make the namespaces"},
		"something else":         {nil, false, "boom", "boom"},
	} {
		t.Run(name, func(t *testing.T) {
			proc := t.TempDir()
			for file, text := range test.files {
				must(t, os.MkdirAll(filepath.Dir(filepath.Join(proc, file)), 0o755))
				must(t, os.WriteFile(filepath.Join(proc, file), []byte(text), 0o644))
			}
			err := (&Driver{ordinary: test.ordinary}).diagnose(proc, test.output, errors.New("exit status 128"), false)
			var cause *machine.ProbeError
			if !errors.As(err, &cause) || !strings.Contains(err.Error(), test.want) || cause.Mend == "" {
				t.Errorf("got %v", err)
			}
		})
	}
}

// TestProbeWithoutNamespaces is real: a child lives where no user namespace can
// be made, and must say so.
func TestProbeWithoutNamespaces(t *testing.T) {
	b := need(t)
	if os.Getenv("CAL_TEST_NO_NAMESPACES") != "" {
		must(t, os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0))
		driver := New(Config{Runsc: b.runsc, Patience: time.Minute})
		driver.ordinary = true
		err := driver.Probe(t.Context())
		if err == nil || !strings.Contains(err.Error(), "max_user_namespaces is 0") {
			t.Errorf("got %v", err)
		}
		return
	}
	if os.Geteuid() == 0 {
		t.Skip("tried by the ordinary user")
	}
	child := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestProbeWithoutNamespaces$", "-test.v")
	child.Env = append(os.Environ(), "CAL_TEST_NO_NAMESPACES=1")
	child.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	output, err := child.CombinedOutput()
	if err != nil || !strings.Contains(string(output), "--- PASS: TestProbeWithoutNamespaces") {
		t.Errorf("%v\n%s", err, output)
	}
}

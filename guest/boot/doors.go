package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// setting is a switch of the kernel under /proc/sys. One that is missing is a door that this
// kernel does not have, but for those that must be there.
type setting struct {
	name  string
	value string
	must  bool
}

// settings are written in this order and read back.
var settings = []setting{
	{"user/max_user_namespaces", "0", true}, // nobody becomes root of a namespace of his own
	{"kernel/kexec_load_disabled", "1", false},
	{"kernel/unprivileged_bpf_disabled", "2", false},
	{"net/core/bpf_jit_harden", "2", false},
	{"kernel/io_uring_disabled", "2", false}, // since Linux 6.6; seccomp has it too
	{"kernel/perf_event_paranoid", "3", false},
	{"vm/unprivileged_userfaultfd", "0", false},
	{"dev/tty/ldisc_autoload", "0", false},
	{"kernel/dmesg_restrict", "1", true},
	{"kernel/kptr_restrict", "2", true},
	{"kernel/randomize_va_space", "2", true},
	{"kernel/sysrq", "0", false},
	{"kernel/core_pattern", "", true},
	{"fs/suid_dumpable", "0", true},
	{"fs/protected_hardlinks", "1", true},
	{"fs/protected_symlinks", "1", true},
	{"fs/protected_fifos", "2", false},
	{"fs/protected_regular", "2", false},
	{"kernel/modules_disabled", "1", false}, // last: it cannot be undone, and some of the above may load one
}

// shutDoors sets what a machine needs no longer once it has started.
func shutDoors(tasks uint64) error {
	for _, s := range settings {
		err := os.WriteFile("/proc/sys/"+s.name, []byte(s.value+"\n"), 0)
		if err != nil && (s.must || !errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("setting %s: %w", s.name, err)
		}
	}
	// What anything in the machine inherits. Where memory ends the proxy is the last that is ended.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-900"), 0); err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("core dumps: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 65536, Max: 1 << 20}); err != nil {
		return fmt.Errorf("open files: %w", err)
	}
	if tasks > 0 {
		if err := unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: tasks, Max: tasks}); err != nil {
			return fmt.Errorf("tasks: %w", err)
		}
	}
	if err := unix.Sethostname([]byte("cal")); err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	return nil
}

func (s setting) check() error {
	got, err := os.ReadFile("/proc/sys/" + s.name)
	switch {
	case err != nil && (s.must || !errors.Is(err, fs.ErrNotExist)):
		return err
	case err == nil && strings.TrimSpace(string(got)) != s.value:
		return fmt.Errorf("%s is %q, and should be %q", s.name, strings.TrimSpace(string(got)), s.value)
	}
	return nil
}

package site

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"cal/machine"
)

// Confinement is what keeps a driver's program in: why it does not come to be is the same
// for all of them.
type Confinement struct {
	Program  string // "runsc", "QEMU"
	Ordinary bool   // the user is not root
	Userns   bool   // it needs a user namespace
	Proc     string // where /proc is
}

// Why says what of the host hinders it, where seen is what came of a try, which was forbidden
// or not; nil where nothing of the host is known to.
func (c Confinement) Why(seen error, forbidden bool) *machine.ProbeError {
	switch {
	case c.Userns && c.read("sys/user/max_user_namespaces") == "0":
		return &machine.ProbeError{Cause: "user namespaces are switched off (user.max_user_namespaces is 0)",
			Mend: "sudo sysctl -w user.max_user_namespaces=28633", Err: seen}
	case c.Ordinary && c.read("sys/kernel/unprivileged_userns_clone") == "0":
		return &machine.ProbeError{Cause: "user namespaces are for root only (kernel.unprivileged_userns_clone is 0)",
			Mend: "sudo sysctl -w kernel.unprivileged_userns_clone=1", Err: seen}
	case c.Ordinary && c.read("sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
		return &machine.ProbeError{Cause: "AppArmor restricts user namespaces of ordinary users (kernel.apparmor_restrict_unprivileged_userns is 1)",
			Mend: "give nucleus-node and runsc an AppArmor profile with `userns,`, or sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0", Err: seen}
	case forbidden && strings.Contains(c.read("self/status"), "Seccomp:\t2"):
		return &machine.ProbeError{Cause: "a seccomp filter around this process, a container's presumably, forbids what confines " + c.Program,
			Mend: "start the container with --security-opt seccomp=unconfined, or a profile that allows unshare, clone, mount, pivot_root and ptrace", Err: seen}
	case forbidden:
		return &machine.ProbeError{Cause: "this process may not make the namespaces and mounts that confine " + c.Program,
			Mend: "in a container give it CAP_SYS_ADMIN or --privileged; else run as an ordinary user of the host", Err: seen}
	}
	return nil
}

func (c Confinement) read(name string) string {
	data, err := os.ReadFile(filepath.Join(c.Proc, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// NoGuest is for a program that runs no guest, where nothing more is known.
func (c Confinement) NoGuest(seen error) *machine.ProbeError {
	return &machine.ProbeError{Cause: fmt.Sprintf("%s runs no guest here", c.Program), Mend: "run `cal doctor` and report what it prints", Err: seen}
}

// Package kvm finds out whether the host's KVM runs a guest.
//
// That /dev/kvm is there, opens, and makes virtual machines and processors proves
// nothing: on a host that is itself a virtual machine the processor may then never run an
// ordinary guest, hang in it, or emulate one instruction after the other until it gives
// up. So the package has a processor count to two million, in a child process that can
// be killed, under a deadline. Where KVM works that takes some milliseconds.
package kvm

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"strings"
	"sync"
	"syscall"
	"time"

	"cal/machine"
)

// Device is where the kernel shows KVM.
const Device = "/dev/kvm"

const (
	name     = "cal-kvm-probe" // argv[0] of the child
	ran      = "KVM ran guest code"
	patience = 1500 * time.Millisecond
)

// Main is the child of Probe. A program that probes calls it first; it returns at
// once in any other process.
func Main() {
	if len(os.Args) != 2 || os.Args[0] != name {
		return
	}
	if err := runGuest(os.Args[1]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(ran)
	os.Exit(0)
}

// Host is this host's KVM. The zero value has not been probed.
type Host struct {
	Patience time.Duration // with a guest; 0: 1.5 s, for which only a host that is emulated itself is too slow

	mu    sync.Mutex
	known bool
	err   error
}

// Probe has a guest run under KVM. The error is a *machine.ProbeError. What cannot change
// while the kernel runs, that a guest ran or that it hung, is kept; who may not open the
// device now may do so later.
func (h *Host) Probe(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.known {
		return h.err
	}
	err := probe(ctx, "/proc/self/exe", Device, cmp.Or(h.Patience, patience))
	if ctx.Err() == nil {
		h.known, h.err = err == nil || errors.Is(err, errHangs), err
	}
	return err
}

// errHangs is wrapped where a guest did not end.
var errHangs = errors.New("no answer in time")

func probe(ctx context.Context, self, device string, patience time.Duration) error {
	file, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return unopened(device, err)
	}
	file.Close()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, self)
	cmd.Args = []string{name, device}
	cmd.Env, cmd.Dir = []string{}, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = time.Second // a process inside a guest that hangs may not even end when it is killed
	var said bytes.Buffer
	cmd.Stdout = &said
	err = cmd.Run()
	text, _, _ := strings.Cut(said.String(), "\n")
	switch {
	case ctx.Err() != nil:
		return &machine.ProbeError{Cause: fmt.Sprintf("%s is there, and a guest that counts to two million did not end within %s: it hangs, or each instruction is emulated", device, patience), Mend: nested, Err: errHangs}
	case err == nil && text == ran:
		return nil
	case err == nil:
		return &machine.ProbeError{Cause: fmt.Sprintf("the probe of %s said %.100q", device, text), Mend: "report it"}
	}
	return &machine.ProbeError{Cause: device + " is there, but runs no guest: " + text, Mend: nested, Err: err}
}

const nested = "switch on nested virtualisation where this host is itself a virtual machine; else see whether its kernel's KVM is whole"

func unopened(device string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &machine.ProbeError{Cause: "there is no " + device, Mend: "load kvm_intel or kvm_amd; switch on virtualisation in the firmware, or nested virtualisation where this host is itself a virtual machine"}
	case errors.Is(err, fs.ErrPermission):
		return &machine.ProbeError{Cause: device + " may not be opened by this user", Mend: admit(device), Err: err}
	}
	return &machine.ProbeError{Cause: device + " does not open", Mend: nested, Err: err}
}

// admit says how a person gets at the device: by its group, where that is one for it.
func admit(device string) string {
	const contained = "; in a container hand in "
	info, err := os.Stat(device)
	if err == nil && info.Mode().Perm()&0o060 == 0o060 {
		if group, err := user.LookupGroupId(fmt.Sprint(info.Sys().(*syscall.Stat_t).Gid)); err == nil && group.Gid != "0" {
			return fmt.Sprintf("sudo usermod -aG %s $USER, and log in again", group.Name) + contained + device
		}
	}
	return fmt.Sprintf("its owner alone may: sudo chmod 0666 %s lets everybody run machines", device) + contained + device
}

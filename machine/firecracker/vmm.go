package firecracker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"cal/internal/process"
	"cal/machine/microvm"
)

// vmm is one Firecracker in its jail, held by this process.
type vmm struct {
	jail         jail
	cgroups      string // where they are mounted
	api          *api
	process      process.Process
	console, log pipe
	work         sync.WaitGroup
	done         chan struct{} // closed when the process has ended, or was let go
	failed       error         // that it was let go; to be read when done is closed
}

// launch starts a Firecracker, of this digest, in a jail that was made, and believes
// nothing of it before it has looked. No guest runs yet.
func (d *Driver) launch(ctx context.Context, j jail, digest string) (_ *vmm, err error) {
	cgroups := d.config.Cgroups
	v := &vmm{jail: j, cgroups: cgroups, api: newAPI(func(ctx context.Context) (net.Conn, error) { return j.dialSocket(ctx, apiSocket) })}
	defer func() {
		if err != nil {
			v.letGo()
		}
	}()
	if err := v.listen(); err != nil { // before it runs, so that its last words are heard
		return nil, err
	}
	if err := noCores(); err != nil {
		return nil, err
	}
	if err := j.run(ctx, d.config.Jailer, d.config.Firecracker); err != nil {
		return nil, err
	}
	if v.process, err = j.await(ctx, v.api, d.config.Cgroups); err != nil {
		return nil, v.explain(err)
	}
	v.watch()
	if err := d.confined(v, digest); err != nil {
		return nil, err
	}
	return v, nil
}

// hold takes over the Firecracker that runs in a jail.
func (j jail) hold(cgroups string) (_ *vmm, err error) {
	v := &vmm{jail: j, cgroups: cgroups, api: newAPI(func(ctx context.Context) (net.Conn, error) { return j.dialSocket(ctx, apiSocket) })}
	if v.process, err = j.find(); err != nil {
		return nil, err
	}
	if err := v.listen(); err != nil {
		v.letGo()
		return nil, err
	}
	v.watch()
	return v, nil
}

// watch tells of the end of the process.
func (v *vmm) watch() {
	v.done = make(chan struct{})
	v.work.Go(func() {
		v.failed = v.process.Ended()
		close(v.done)
	})
}

// ended says whether the process has.
func (v *vmm) ended() bool {
	select {
	case <-v.done:
		return v.failed == nil
	default:
		return false
	}
}

// noCores lets neither this process nor what it starts write a core: keys and the
// memory of guests would be in it.
var noCores = sync.OnceValue(func() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil {
		return err
	}
	limit.Cur = 0
	return unix.Setrlimit(unix.RLIMIT_CORE, &limit)
})

// coreless reads back that a process writes no core.
func coreless(pid int) error {
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		return err
	}
	const name = "Max core file size"
	for line := range strings.Lines(string(limits)) {
		if fields := strings.Fields(strings.TrimPrefix(line, name)); strings.HasPrefix(line, name) && fields[0] == "0" {
			return nil
		}
	}
	return errors.New("firecracker may write a core")
}

// listen begins to record both pipes.
func (v *vmm) listen() (err error) {
	if v.console.file, err = v.jail.openPipe(consolePipe); err != nil {
		return err
	}
	v.work.Go(v.console.record)
	if v.log.file, err = v.jail.openPipe(logPipe); err != nil {
		return err
	}
	v.work.Go(v.log.record)
	return nil
}

// letGo ends this process's part and leaves the Firecracker as it is.
func (v *vmm) letGo() {
	v.process.Close()
	v.console.file.Close()
	v.log.file.Close()
	v.work.Wait()
}

// explain adds to an error what Firecracker logged last.
func (v *vmm) explain(err error) error {
	if said := v.lastWords(); said != "" {
		return fmt.Errorf("%w: %s", err, said)
	}
	return err
}

// reasons mark the lines of Firecracker's log that say why something failed.
var reasons = []string{":ERROR]", "bad syscall", "panicked"}

// lastWords is the last line of the log that says why something failed, or "".
func (v *vmm) lastWords() string {
	lines := strings.Split(v.log.String(), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		for _, reason := range reasons {
			if strings.Contains(lines[i], reason) {
				return line(lines[i])
			}
		}
	}
	return ""
}

// confined checks of a Firecracker which has not started a guest that it is the program
// that was proved, the jail's user, alone in its namespaces and held by its cgroup; no
// core of the guest's memory may ever be written.
func (d *Driver) confined(v *vmm, digest string) error {
	pid := v.process.PID
	if err := coreless(pid); err != nil {
		return err
	}
	its, err := fileDigest(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return err
	}
	if its != digest {
		return fmt.Errorf("the jail's firecracker has digest %s, want %s", its, digest)
	}
	if err := v.jail.checkUser(pid); err != nil {
		return err
	}
	if err := ownNamespaces(pid); err != nil {
		return err
	}
	return errors.Join(v.jail.checkGroup(d.config.Cgroups, pid), v.jail.withoutNetwork())
}

// ownNamespaces reads back that a process has none of this one's.
func ownNamespaces(pid int) error {
	for _, kind := range []string{"net", "pid", "mnt", "ipc", "uts"} {
		its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		own, errOwn := os.Readlink("/proc/self/ns/" + kind)
		if err := errors.Join(err, errOwn); err != nil {
			return err
		}
		if its == own {
			return fmt.Errorf("firecracker shares the host's %s namespace", kind)
		}
	}
	return nil
}

// withoutNetwork takes the device out of a jail with which network interfaces are made.
// The Firecracker in it has run nothing yet.
func (j jail) withoutNetwork() error {
	err := os.Remove(j.path("dev/net/tun"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// checkUser reads back who a process of the jail is.
func (j jail) checkUser(pid int) error {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return err
	}
	id := strings.TrimSpace(strings.Repeat(fmt.Sprintf("%d ", j.UID), 4))
	none := strings.Repeat("0", 16)
	for key, want := range map[string]string{"Uid": id, "Gid": id, "Groups": "", "CapPrm": none, "CapEff": none, "CapInh": none, "CapAmb": none} {
		if got := statusValue(string(status), key); got != want {
			return fmt.Errorf("firecracker has %s %q, want %q", key, got, want)
		}
	}
	return nil
}

// serial is where the guest's console goes: 64 KiB a second at most.
func (v *vmm) serial(ctx context.Context) error {
	return v.api.setSerial(ctx, serialDevice{Path: "/" + consolePipe, Limit: &tokenBucket{Size: 64 << 10, Refill: 1000}})
}

func fileDigest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// died is what to say of a Firecracker that has ended by itself.
func (v *vmm) died() string {
	switch {
	case v.jail.group().OutOfMemory(v.cgroups):
		return "the kernel killed firecracker: it exceeded its memory limit"
	case v.lastWords() != "":
		return "firecracker ended: " + v.lastWords()
	case microvm.LastWords(v.console.String()) != "":
		return "the machine ended; the console's last line: " + line(microvm.LastWords(v.console.String()))
	}
	return "the machine ended"
}

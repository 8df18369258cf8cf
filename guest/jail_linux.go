package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cal/nucleus"
)

// A jail is a child of the proxy in pid, mount, network and IPC namespaces of
// its own. Its first stage runs as the container's root, makes the mounts,
// raises lo, opens the listeners and hands them to the proxy; then it gives up
// every privilege and becomes the second stage. So nobody else in the machine
// can reach the listeners, and nothing in the jail ever held more than it needs.

// Descriptors of a jail's first stage. 0 to 2 are the terminal or pipes.
const (
	fdControl = 3 // socket to the proxy: jailPlan in, listeners out, then the second stage's stream
)

// The kinds of jails.
const (
	toolsJail = "tools"
	agentJail = "agent"
)

// jailPlan is what the proxy tells the first stage.
type jailPlan struct {
	Kind   string            `json:"kind"` // toolsJail or agentJail
	UID    int               `json:"uid"`
	GID    int               `json:"gid"`
	Listen []string          `json:"listen"` // TCP addresses
	DNS    bool              `json:"dns"`    // a stub that answers NXDOMAIN
	Layers []AgentLayer      `json:"layers,omitempty"`
	Show   bool              `json:"show,omitempty"` // tools: the agent's layers stay in sight
	Next   []string          `json:"next,omitempty"` // agent: argv of the second stage
	Env    []string          `json:"env,omitempty"`  // agent: of the second stage
	Home   map[string][]byte `json:"home,omitempty"`
}

// jail is a running one, as the proxy sees it.
type jail struct {
	cmd       *exec.Cmd
	control   *net.UnixConn
	listeners []net.Listener
	dns       net.PacketConn
}

const jailDeadline = 20 * time.Second

// startJail starts the first stage and returns when the listeners are there. With
// setup the caller sets stdio before the start.
func startJail(plan jailPlan, setup func(*exec.Cmd)) (*jail, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	cmd := exec.Command(nucleus.MachineProxy, "jail")
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC,
	}
	cmd.Stderr = os.Stderr
	if setup != nil {
		setup(cmd)
	}
	if plan.Kind == toolsJail { // it stays this program; the agent's first stage has files to give away before
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(plan.UID), Gid: uint32(plan.GID)}
	}
	if err := startBounded(cmd); err != nil {
		ours.Close()
		return nil, fmt.Errorf("starting the %s jail: %w", plan.Kind, err)
	}
	j := &jail{cmd: cmd, control: ours}
	err = giveWay(cmd.Process.Pid, plan.Kind)
	if err == nil {
		err = j.handshake(plan)
	}
	if err != nil {
		j.kill()
		return nil, fmt.Errorf("setting up the %s jail: %w", plan.Kind, err)
	}
	return j, nil
}

// Where memory ends, what is ended first: a tool's command (package tools says so), then the
// agent, then the tools' worker, and never the proxy, which the machine's first process has made
// the last.
const (
	workerGivesWay = "0"
	agentGivesWay  = "300"
)

func giveWay(pid int, kind string) error {
	score := workerGivesWay
	if kind == agentJail {
		score = agentGivesWay
	}
	return os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(score), 0)
}

func (j *jail) handshake(plan jailPlan) error {
	j.control.SetDeadline(time.Now().Add(jailDeadline))
	defer j.control.SetDeadline(time.Time{})
	message, err := json.Marshal(plan)
	if err != nil {
		return err
	}
	if err := writeBlock(j.control, message); err != nil {
		return err
	}
	answer, files, err := recvFiles(j.control)
	if err != nil {
		return fmt.Errorf("no answer from the first stage: %w", err)
	}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if answer != "ok" {
		return errors.New(answer)
	}
	want := len(plan.Listen)
	if plan.DNS {
		want++
	}
	if len(files) != want {
		return fmt.Errorf("%d listeners, want %d", len(files), want)
	}
	for i := range plan.Listen {
		l, err := net.FileListener(files[i])
		if err != nil {
			return err
		}
		j.listeners = append(j.listeners, l)
	}
	if plan.DNS {
		if j.dns, err = net.FilePacketConn(files[len(files)-1]); err != nil {
			return err
		}
	}
	return nil
}

// kill ends every process of the jail: its first process is init of a pid
// namespace, so the kernel takes the others with it.
func (j *jail) kill() {
	j.cmd.Process.Kill()
	j.cmd.Wait()
	j.close()
}

func (j *jail) close() {
	j.control.Close()
	for _, l := range j.listeners {
		l.Close()
	}
	if j.dns != nil {
		j.dns.Close()
	}
}

// RunJail is the first stage. It becomes the second, the tools' worker without
// starting another program, the agent by exec, and returns when that ends.
func RunJail() error {
	runtime.LockOSThread() // what this thread is given up, an exec takes along
	conn, err := fileConn(fdControl, "control")
	if err != nil {
		return err
	}
	conn.SetDeadline(time.Now().Add(jailDeadline))
	raw, err := readBlock(conn, 32<<20)
	if err != nil {
		return err
	}
	var plan jailPlan
	if err := json.Unmarshal(raw, &plan); err != nil {
		return err
	}
	files, err := buildJail(plan)
	if err != nil {
		return errors.Join(err, sendFiles(conn, err.Error(), nil))
	}
	// Privileges go before the answer: a jail that could not drop them is refused.
	if err := dropPrivileges(plan); err != nil {
		return errors.Join(err, sendFiles(conn, err.Error(), nil))
	}
	if err := sendFiles(conn, "ok", files); err != nil {
		return err
	}
	for _, f := range files {
		f.Close()
	}
	conn.Close()
	if plan.Kind == toolsJail {
		runtime.UnlockOSThread() // every thread is the tools' user now
		os.Clearenv()
		return RunTools(context.Background())
	}
	return fmt.Errorf("exec %s: %w", plan.Next[0], syscall.Exec(plan.Next[0], plan.Next, plan.Env))
}

func buildJail(plan jailPlan) ([]*os.File, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("making mounts private: %w", err)
	}
	var err error
	switch plan.Kind {
	case toolsJail:
		err = toolsRoot(plan.Show)
	case agentJail:
		err = agentRoot(plan)
	default:
		err = fmt.Errorf("unknown kind of jail %q", plan.Kind)
	}
	if err != nil {
		return nil, err
	}
	if err := raiseLoopback(); err != nil {
		return nil, err
	}
	return openListeners(plan)
}

// toolsRoot gives the tools a /proc of their own namespace and takes the proxy's
// and the agent's places out of sight.
func toolsRoot(show bool) error {
	if err := mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	if _, err := os.Stat(nucleus.MachineAgent); err == nil && !show {
		return mount("tmpfs", nucleus.MachineAgent, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_RDONLY, "mode=000,size=4k")
	}
	return nil
}

// agentRoot builds the agent's own root: its install, an empty HOME, generated
// files of /etc, a few devices. No workspace, no shell, no git.
func agentRoot(plan jailPlan) error {
	const root = "/tmp/.agent-root"
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	var memory unix.Sysinfo_t
	if err := unix.Sysinfo(&memory); err != nil {
		return err
	}
	// Files there are memory.
	size := min(512<<20, memory.Totalram*uint64(memory.Unit)*2/5)
	if err := mount("tmpfs", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("mode=755,size=%d", size)); err != nil {
		return err
	}
	for _, dir := range []string{"proc", "dev", "dev/shm", "dev/pts", "etc", "tmp", "home", "home/agent", "home/agent/work", "old"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	for _, l := range plan.Layers {
		if err := bindReadOnly(l.Source, filepath.Join(root, l.Path)); err != nil {
			return err
		}
	}
	for _, dev := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		target := filepath.Join(root, "dev", dev)
		if err := os.WriteFile(target, nil, 0o666); err != nil {
			return err
		}
		if err := mount("/dev/"+dev, target, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	if err := mount("/dev/pts", filepath.Join(root, "dev/pts"), "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if err := mount("tmpfs", filepath.Join(root, "dev/shm"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777,size=64m"); err != nil {
		return err
	}
	if err := mount("proc", filepath.Join(root, "proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	if err := agentFiles(root, plan); err != nil {
		return err
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "old"); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Unmount("/old", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmounting the machine's root: %w", err)
	}
	if err := os.Remove("/old"); err != nil {
		return err
	}
	return unix.Chdir(nucleus.MachineHome + "/" + WorkDir)
}

// agentFiles writes /etc and HOME. HOME is the agent's own, but for the files in
// its working directory, which are copies of instructions and stay root's.
func agentFiles(root string, plan jailPlan) error {
	etc := map[string]string{
		"passwd":        fmt.Sprintf("root:x:0:0:root:/:/none\nagent:x:%d:%d:agent:/home/agent:/none\n", plan.UID, plan.GID),
		"group":         fmt.Sprintf("root:x:0:\nagent:x:%d:\n", plan.GID),
		"hosts":         "127.0.0.1 localhost\n::1 localhost\n",
		"resolv.conf":   "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
		"nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
	}
	for name, text := range etc {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := os.Chmod(filepath.Join(root, "tmp"), 0o1777|os.ModeSticky); err != nil {
		return err
	}
	home, err := os.OpenRoot(filepath.Join(root, "home/agent"))
	if err != nil {
		return err
	}
	defer home.Close()
	var readOnly []string
	for name, data := range plan.Home {
		if err := home.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := home.WriteFile(name, data, 0o600); err != nil {
			return err
		}
		if strings.HasPrefix(name, WorkDir+"/") {
			readOnly = append(readOnly, name)
		}
	}
	err = filepath.WalkDir(filepath.Join(root, "home/agent"), func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, plan.UID, plan.GID)
	})
	for _, name := range readOnly {
		err = errors.Join(err, home.Chown(name, 0, 0), home.Chmod(name, 0o444))
	}
	return err
}

func bindReadOnly(source, target string) error {
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(target, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(target), 0o755); err == nil {
		err = os.WriteFile(target, nil, 0o644)
	}
	if err != nil {
		return err
	}
	if err := mount(source, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	return mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "")
}

func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s at %s: %w", source, target, err)
	}
	return nil
}

func raiseLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	// gVisor has no such ioctl and no need of it: lo is up in every new namespace.
	// Where it is not, the listeners cannot be opened and the jail is refused.
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil && err != unix.ENOTTY {
		return fmt.Errorf("raising lo: %w", err)
	}
	return nil
}

func openListeners(plan jailPlan) ([]*os.File, error) {
	var files []*os.File
	for _, addr := range plan.Listen {
		l, err := net.Listen("tcp4", addr)
		if err != nil {
			return nil, err
		}
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			return nil, err
		}
		l.Close()
		files = append(files, f)
	}
	if plan.DNS {
		c, err := net.ListenPacket("udp4", dnsAddr)
		if err != nil {
			return nil, err
		}
		f, err := c.(*net.UDPConn).File()
		if err != nil {
			return nil, err
		}
		c.Close()
		files = append(files, f)
	}
	return files, nil
}

// startBounded starts cmd with this process's capabilities, but so that none can
// ever be had again once they are given up: its bounding set is empty. A child
// takes both sets from the thread that starts it, and that thread ends here.
func startBounded(cmd *exec.Cmd) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this function
		done <- func() error {
			header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var caps [2]unix.CapUserData
			if err := unix.Capget(&header, &caps[0]); err != nil {
				return err
			}
			var kept []uintptr
			for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
				if caps[c/32].Permitted&(1<<(c%32)) != 0 {
					kept = append(kept, c)
				}
			}
			for i := range caps {
				caps[i].Inheritable = caps[i].Permitted
			}
			if err := unix.Capset(&header, &caps[0]); err != nil {
				return err
			}
			cmd.SysProcAttr.AmbientCaps = kept
			for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
				// EINVAL: a capability that this kernel does not know.
				if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && err != unix.EINVAL {
					return fmt.Errorf("dropping capability %d from the bounding set: %w", c, err)
				}
			}
			return cmd.Start()
		}()
	}()
	return <-done
}

// writable are the places that a jail's user can have files in, and the kernel's own, where files
// have owners.
var writable = []string{nucleus.MachineHome, nucleus.MachineWorkspace, "/tmp", "/var/tmp", "/dev", "/proc"}

// dropPrivileges makes the process, all its threads, the jail's user without any
// capability, for ever: neither it nor what it executes can gain one.
func dropPrivileges(plan jailPlan) error {
	if os.Getuid() != plan.UID || os.Getgid() != plan.GID {
		if err := setIDs(plan.UID, plan.GID); err != nil {
			return err
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := everyThread(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0])), 0); err != nil {
		return fmt.Errorf("giving up capabilities: %w", err)
	}
	if err := everyThread(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	// The tools' worker confines what it starts.
	if plan.Kind == agentJail {
		if err := keepWritesBelow(writable); err != nil {
			return err
		}
	}
	if err := loadSeccomp(plan.Kind); err != nil {
		return err
	}
	return checkDropped(plan)
}

// everyThread makes a system call on each thread of the process: credentials,
// capabilities and no_new_privs belong to threads.
func everyThread(trap, a1, a2, a3 uintptr) error {
	// The C library's own threads are out of reach: built with cgo this returns ENOTSUP.
	if _, _, e := syscall.AllThreadsSyscall6(trap, a1, a2, a3, 0, 0, 0); e != 0 {
		return e
	}
	return nil
}

// setIDs has the standard library change every thread.
func setIDs(uid, gid int) error {
	if err := syscall.Setgroups(nil); err != nil {
		return fmt.Errorf("setgroups: %w", err)
	}
	if err := syscall.Setresgid(gid, gid, gid); err != nil {
		return fmt.Errorf("setresgid %d: %w", gid, err)
	}
	if err := syscall.Setresuid(uid, uid, uid); err != nil {
		return fmt.Errorf("setresuid %d: %w", uid, err)
	}
	return nil
}

// checkDropped reads of each thread what the kernel says. One that kept anything
// is a reason not to serve.
func checkDropped(plan jailPlan) error {
	want := map[string]string{
		"Uid": fmt.Sprintf("%d %d %d", plan.UID, plan.UID, plan.UID), "Gid": fmt.Sprintf("%d %d %d", plan.GID, plan.GID, plan.GID),
		"CapInh": noCapability, "CapPrm": noCapability, "CapEff": noCapability, "CapBnd": noCapability, "CapAmb": noCapability,
		"NoNewPrivs": "1", "Seccomp": "2", "Groups": "",
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return fmt.Errorf("reading this process's threads: %w", err)
	}
	for _, task := range tasks {
		status, err := os.ReadFile(filepath.Join("/proc/self/task", task.Name(), "status"))
		if err != nil {
			return fmt.Errorf("thread %s: %w", task.Name(), err)
		}
		checked := 0
		for line := range strings.Lines(string(status)) {
			name, value, _ := strings.Cut(line, ":")
			wanted, ok := want[name]
			if !ok {
				continue
			}
			fields := strings.Fields(value)
			if got := strings.Join(fields[:min(3, len(fields))], " "); got != wanted {
				return fmt.Errorf("thread %s kept %s %q, want %q", task.Name(), name, got, wanted)
			}
			checked++
		}
		if checked != len(want) {
			return fmt.Errorf("thread %s: the kernel says %d of the %d things to check", task.Name(), checked, len(want))
		}
	}
	return nil
}

const noCapability = "0000000000000000"

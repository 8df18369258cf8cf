// Command testguest stands in for the tool-proxy where a driver is tried: it
// does what it is told over the wire, with the rights that it has, so that a
// test can try a wall from the inside. It must never be shipped.
//
//	testguest init     PID 1: serve the wire on descriptor 3
//	testguest attach   hand descriptor 3, a new wire, to the running init
//	testguest probe    print "ok": the driver's proof that guest code runs
//	testguest act JSON one action on behalf of init, as another user
package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"sort"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cal/guest/boot"
	"cal/machine/machinetest/script"
	"cal/nucleus"
)

// attachName is an abstract socket: it needs no writable directory.
const attachName = "@testguest-attach"

func main() {
	if boot.IsInit() {
		boot.Main()
	}
	if len(os.Args) < 2 || os.Args[1] == "act" && len(os.Args) < 3 {
		fail(fmt.Errorf("usage: testguest init|attach|probe|act"))
	}
	var err error
	switch os.Args[1] {
	case "init":
		err = serveInit()
	case "attach":
		err = attach()
	case "probe":
		_, err = fmt.Println("ok")
	case "act":
		err = act(os.Args[2])
	}
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "testguest:", err)
	os.Exit(1)
}

func serveInit() error {
	unix.CloseOnExec(3)
	fmt.Println("testguest: up")
	listener, err := net.Listen("unix", attachName)
	if err != nil {
		return err
	}
	go func() {
		serveWire(os.NewFile(3, "wire"), nil)
	}()
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		wire, err := receiveFile(conn.(*net.UnixConn))
		if err != nil {
			conn.Close()
			continue
		}
		go serveWire(wire, conn)
	}
}

// attach hands a wire to the guest that serves. Who made its machine may have died before that
// listened; a node waits for a proxy's first answer, and this for the listener.
func attach() error {
	var conn net.Conn
	var err error
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if conn, err = net.Dial("unix", attachName); err == nil {
			break
		}
		if !errors.Is(err, unix.ECONNREFUSED) || time.Now().After(deadline) {
			return err
		}
	}
	defer conn.Close()
	_, _, err = conn.(*net.UnixConn).WriteMsgUnix([]byte{0}, unix.UnixRights(3), nil)
	if err != nil {
		return err
	}
	answer, err := io.ReadAll(conn)
	if err == nil && string(answer) != "ok" {
		err = fmt.Errorf("wire refused: %s", answer)
	}
	return err
}

func receiveFile(conn *net.UnixConn) (*os.File, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("attach: %d messages: %v", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(fds[0])
	return os.NewFile(uintptr(fds[0]), "wire"), nil
}

// serveWire does what it is told. A wire that is handed in later must first say
// who it is: as with the real proxy, the hand-over ends only after that.
func serveWire(wire *os.File, door net.Conn) {
	defer wire.Close()
	decoder, encoder := json.NewDecoder(wire), json.NewEncoder(wire)
	for {
		var action script.Action
		if decoder.Decode(&action) != nil {
			return
		}
		if door != nil {
			defer door.Close()
			if action.Data != script.Proof {
				io.WriteString(door, "no proof")
				return
			}
			io.WriteString(door, "ok")
			door.Close()
			door = nil
		}
		reply := perform(action)
		if err := settle(); err != nil && reply.Err == "" {
			reply.Err = err.Error()
		}
		if encoder.Encode(reply) != nil {
			return
		}
	}
}

// settle does what the proxy owes after a call where the workspace is a disk
// (machine.Facts.Sync).
func settle() error {
	const ext4 = 0xef53
	var fs unix.Statfs_t
	if unix.Statfs(nucleus.MachineWorkspace, &fs) != nil || fs.Type != ext4 {
		return nil
	}
	dir, err := os.Open(nucleus.MachineWorkspace)
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Syncfs(int(dir.Fd()))
}

// perform does the action in this process, or in a child where another user or
// the loss of all capabilities is asked for.
func perform(action script.Action) script.Reply {
	if action.UID < 0 {
		return do(action)
	}
	uid := action.UID
	action.UID = -1
	text, err := json.Marshal(action)
	if err != nil {
		return script.Reply{Err: err.Error()}
	}
	child := exec.Command("/proc/self/exe", "act", string(text))
	child.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid), NoSetGroups: uid == 0}}
	output, err := child.Output()
	if err != nil {
		return script.Reply{Err: fmt.Sprintf("child: %v", err)}
	}
	var reply script.Reply
	if err := json.Unmarshal(output, &reply); err != nil {
		return script.Reply{Err: err.Error()}
	}
	return reply
}

func act(text string) error {
	var action script.Action
	if err := json.Unmarshal([]byte(text), &action); err != nil {
		return err
	}
	if err := dropCapabilities(); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(do(action))
}

// dropCapabilities makes uid 0 what the tools' user is where only one id is mapped.
func dropCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	return unix.Capset(&header, &none[0])
}

func do(action script.Action) script.Reply {
	data, err := actions[action.Do](action)
	if err != nil {
		return script.Reply{Data: data, Err: err.Error()}
	}
	return script.Reply{Data: data}
}

var actions = map[string]func(script.Action) (string, error){
	"echo": func(a script.Action) (string, error) { return a.Data, nil },
	"read": func(a script.Action) (string, error) {
		data, err := os.ReadFile(a.Path)
		return string(data), err
	},
	"write": func(a script.Action) (string, error) {
		return "", os.WriteFile(a.Path, []byte(a.Data), 0o644)
	},
	"flood":  flood,
	"alter":  func(a script.Action) (string, error) { return "", script.Alter(a.Path) },
	"mkdir":  func(a script.Action) (string, error) { return "", os.MkdirAll(a.Path, 0o755) },
	"remove": func(a script.Action) (string, error) { return "", os.RemoveAll(a.Path) },
	"list":   list,
	"find":   find,
	"stat":   stat,
	"env":    func(script.Action) (string, error) { return strings.Join(os.Environ(), "\n"), nil },
	"id": func(script.Action) (string, error) {
		return fmt.Sprintf("%d:%d", os.Getuid(), os.Getgid()), nil
	},
	"run":     run,
	"fork":    fork,
	"fill":    fill,
	"release": func(script.Action) (string, error) { held = nil; debug.FreeOSMemory(); return "", nil },
	"stdout":  func(a script.Action) (string, error) { _, err := fmt.Print(a.Data); return "", err },
	"dial": func(a script.Action) (string, error) {
		conn, err := net.DialTimeout(a.Data, a.Path, 2*time.Second)
		if err == nil {
			conn.Close()
		}
		return "", err
	},
	"vsock":      vsock,
	"raw":        raw,
	"interfaces": interfaces,
	"mknod": func(a script.Action) (string, error) {
		return "", unix.Mknod(a.Path, unix.S_IFBLK|0o666, int(unix.Mkdev(8, 0)))
	},
	"close":      func(a script.Action) (string, error) { return "", os.Chmod(a.Path, 0) },
	"setuid-bit": func(a script.Action) (string, error) { return "", os.Chmod(a.Path, 0o755|os.ModeSetuid) },
	"link":       func(a script.Action) (string, error) { return "", os.Symlink(a.Data, a.Path) },
	"random": func(script.Action) (string, error) {
		bytes := make([]byte, 32)
		_, err := rand.Read(bytes)
		return hex.EncodeToString(bytes), err
	},
	"hash": func(script.Action) (string, error) {
		return fmt.Sprint(maphash.String(seed, "the process's own seed")), nil
	},
	"clock": func(script.Action) (string, error) { return time.Now().Format(time.RFC3339Nano), nil },
	"set":   func(a script.Action) (string, error) { kept = a.Data; return "", nil },
	"get":   func(script.Action) (string, error) { return kept, nil },
	"remount": func(a script.Action) (string, error) {
		return "", unix.Mount("", a.Path, "", unix.MS_REMOUNT|unix.MS_BIND, "")
	},
	"overlay": func(a script.Action) (string, error) {
		return "", unix.Mount("overlay", a.Path, "overlay", unix.MS_NOSUID|unix.MS_NODEV, a.Data)
	},
}

// raw writes over the beginning of a disk, past all that the machine's kernel has mounted:
// the device is made anew, and the kernel is told that it may be written.
func raw(a script.Action) (string, error) {
	number, err := os.ReadFile("/sys/block/" + a.Path + "/dev")
	if err != nil {
		return "", err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(number), "%d:%d", &major, &minor); err != nil {
		return "", err
	}
	const place = "/opt"
	if err := unix.Mount("tmpfs", place, "tmpfs", 0, ""); err != nil {
		return "", err
	}
	defer unix.Unmount(place, unix.MNT_DETACH)
	if err := unix.Mknod(place+"/raw", unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor))); err != nil {
		return "", err
	}
	device, err := os.OpenFile(place+"/raw", os.O_RDONLY, 0)
	if err != nil {
		return "", err
	}
	defer device.Close()
	if err := unix.IoctlSetPointerInt(int(device.Fd()), unix.BLKROSET, 0); err != nil {
		return "", err
	}
	writable, err := os.OpenFile(place+"/raw", os.O_WRONLY|os.O_SYNC, 0)
	if err != nil {
		return "", err
	}
	defer writable.Close()
	_, err = writable.WriteAt([]byte(a.Data), 0)
	return "", err
}

func list(a script.Action) (string, error) {
	entries, err := os.ReadDir(a.Path)
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return strings.Join(names, "\n"), err
}

// find reads every file below Path and answers with those that hold Data.
func find(a script.Action) (string, error) {
	var found []string
	err := filepath.WalkDir(a.Path, func(path string, entry os.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if strings.Contains(entry.Name(), a.Data) {
			found = append(found, path)
		}
		if !entry.Type().IsRegular() {
			return nil
		}
		if data, err := os.ReadFile(path); err == nil && strings.Contains(string(data), a.Data) {
			found = append(found, path)
		}
		return nil
	})
	sort.Strings(found)
	return strings.Join(found, "\n"), err
}

func stat(a script.Action) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(a.Path, &st); err != nil {
		return "", err
	}
	return fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid), nil
}

func run(a script.Action) (string, error) {
	cmd := exec.Command(a.Args[0], a.Args[1:]...)
	cmd.Dir = a.Path
	output, err := cmd.CombinedOutput()
	return string(output), err
}

// fork starts N processes that live at once and says how many came to be.
func fork(a script.Action) (string, error) {
	var children []*exec.Cmd
	var failed error
	for len(children) < a.N && failed == nil {
		child := exec.Command("/proc/self/exe", "attach-never")
		child.Args = []string{"testguest", "act", `{"do":"wait","uid":-1}`}
		in, err := child.StdinPipe()
		if err != nil {
			failed = err
			break
		}
		defer in.Close()
		if failed = child.Start(); failed == nil {
			children = append(children, child)
		}
	}
	n := len(children)
	for _, child := range children {
		child.Process.Kill()
		child.Wait()
	}
	return fmt.Sprint(n), failed
}

func init() {
	actions["wait"] = func(script.Action) (string, error) {
		_, err := io.Copy(io.Discard, os.Stdin)
		return "", err
	}
}

// flood writes N MiB that cannot be told from noise to a file, down to its disk.
func flood(a script.Action) (string, error) {
	f, err := os.Create(a.Path)
	if err != nil {
		return "", err
	}
	noise := mathrand.NewChaCha8([32]byte{})
	_, err = io.CopyN(f, noise, int64(a.N)<<20)
	return "", errors.Join(err, f.Sync(), f.Close())
}

// fill touches N MiB of memory and keeps them.
func fill(a script.Action) (string, error) {
	for range a.N {
		block := make([]byte, 1<<20)
		for i := 0; i < len(block); i += 4096 {
			block[i] = 1
		}
		held = append(held, block)
	}
	return "", nil
}

var (
	held [][]byte
	kept string
	seed = maphash.MakeSeed() // of what the kernel gives to each process
)

// vsock connects to port N of the host.
func vsock(a script.Action) (string, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.AF_VSOCK, unix.SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD, &unix.Timeval{Sec: 2}); err != nil {
		return "", err
	}
	return "", unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: uint32(a.N)})
}

func interfaces(script.Action) (string, error) {
	list, err := net.Interfaces()
	var names []string
	for _, i := range list {
		names = append(names, i.Name)
	}
	return strings.Join(names, " "), err
}

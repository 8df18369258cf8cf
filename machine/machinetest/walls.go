package machinetest

import (
	"crypto/rand"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"cal/machine"
	"cal/machine/machinetest/script"
	"cal/machine/site"
	"cal/nucleus"
)

// testWalls tries from the inside what must not be possible. A driver without
// a tier promises no wall.
func testWalls(t *testing.T, host Host) {
	if host.Driver().Tier() == nucleus.TierNone {
		t.Skip("driver promises no wall")
	}
	for _, test := range []struct {
		name string
		try  func(*testing.T, Host)
	}{
		{"host files", testHostFiles},
		{"private files of an image", testPrivateFiles},
		{"doors of the workspace", testDoors},
	} {
		t.Run(test.name, func(t *testing.T) { test.try(t, host) })
	}
}

// plant puts a canary wherever a host keeps what is nobody's business.
func plant(t *testing.T, host Host) (canary, home string) {
	t.Helper()
	canary = "canary-" + strings.ToLower(rand.Text())
	home, err := os.MkdirTemp(host.Scratch, "home")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(home) })
	// Not t.Setenv: drivers may be tried in parallel, and the name is this test's own.
	must(t, os.Setenv("CAL_TEST_"+canary, canary))
	t.Cleanup(func() { os.Unsetenv("CAL_TEST_" + canary) })
	must(t, os.Mkdir(filepath.Join(home, ".ssh"), 0o755))
	for _, name := range []string{filepath.Join(home, ".ssh/id"), filepath.Join("/var/tmp", canary), filepath.Join(os.TempDir(), canary), filepath.Join("/run", canary)} {
		if err := os.WriteFile(name, []byte(canary), 0o644); err != nil && !strings.HasPrefix(name, "/run/") {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(name) })
	}
	return canary, home
}

// searched are all places of a machine but the programs and the kernel's own.
var searched = []string{"/etc", "/home", "/root", "/var", "/run", "/tmp", "/opt", "/srv", "/mnt", "/media", "/boot", "/dev", "/.nucleus/agent"}

func testHostFiles(t *testing.T, host Host) {
	canary, home := plant(t, host)
	look := func(guest *Guest) (found []string) {
		for _, place := range searched {
			if reply := guest.Try(script.Action{Do: "find", Path: place, Data: canary, UID: -1}); reply.Data != "" {
				found = append(found, reply.Data)
			}
		}
		return found
	}
	spec := host.Spec(t)
	m, guest := host.Create(t, spec)
	if host.Disk {
		tryDoorsOfDisk(t, spec, m, guest)
	}
	if found := look(guest); found != nil {
		t.Errorf("files of the host: %v", found)
	}
	for _, pid := range []string{"1", "self"} {
		if env := guest.Must(script.Action{Do: "read", Path: "/proc/" + pid + "/environ", UID: -1}); strings.Contains(env, canary) || strings.Contains(env, home) {
			t.Errorf("environment of the host in process %s: %q", pid, env)
		}
	}
	allowed := strings.Fields("bin dev etc home lib lib32 lib64 libx32 opt proc root run sbin sys tmp usr var .nucleus")
	for name := range strings.Lines(guest.Must(script.Action{Do: "list", Path: "/", UID: -1})) {
		if !slices.Contains(allowed, strings.TrimSpace(name)) {
			t.Errorf("the machine's root holds %q", name)
		}
	}
	for _, path := range []string{"/etc/shadow", "/etc/gshadow", "/etc/ssh", "/etc/sudoers", "/etc/ssl/private", home, "/proc/1/root" + home} {
		guest.MustFail(script.Action{Do: "stat", Path: path, UID: -1})
	}
	if got := guest.Must(script.Action{Do: "interfaces", UID: -1}); got != "lo" {
		t.Errorf("network interfaces: %q", got)
	}

	// Control: a layer is a door, and then the search finds the canary.
	layer := filepath.Join(home, ".ssh")
	must(t, os.Chmod(layer, 0o777))
	spec = host.Spec(t)
	spec.Image.Layers = []nucleus.Layer{{Name: "mutant", Host: layer, Guest: "/opt/leak"}}
	spec.Agent = []nucleus.Layer{{Name: "agent", Host: layer, Guest: nucleus.MachineAgent + "/0"}}
	m, guest = host.Create(t, spec)
	if found := look(guest); !slices.Equal(found, []string{"/opt/leak/id", nucleus.MachineAgent + "/0/id"}) {
		t.Errorf("the search cannot see a canary that is there: %v", found)
	}
	tryReadOnly(t, m, guest)
	if entries, err := os.ReadDir(layer); err != nil || len(entries) != 1 {
		t.Errorf("layer on the host: %v, %v", entries, err)
	}
}

// testPrivateFiles: what `other` cannot read is in no machine, not even for its root.
func testPrivateFiles(t *testing.T, host Host) {
	image := filepath.Join(host.Spec(t).Workspace, "image")
	for _, dir := range []string{"usr/share", "usr/private", "opt", "etc", "home/agent", "home/somebody"} {
		must(t, os.MkdirAll(filepath.Join(image, dir), 0o755))
	}
	for name, mode := range map[string]os.FileMode{
		"usr/share/public": 0o644, "usr/share/group": 0o640, "usr/share/owner": 0o600, "usr/share/none": 0,
		"usr/private/inside": 0o644, "etc/public": 0o644, "etc/private": 0o640, "home/agent/private": 0o644, "home/somebody/public": 0o644,
	} {
		path := filepath.Join(image, name)
		must(t, os.WriteFile(path, []byte("content"), 0o644))
		must(t, os.Chmod(path, mode))
	}
	must(t, os.Chmod(filepath.Join(image, "usr/private"), 0o750))
	must(t, syscall.Mkfifo(filepath.Join(image, "usr/share/fifo"), 0o666))
	must(t, os.Symlink("/etc/shadow", filepath.Join(image, "etc/link")))
	spec := host.Spec(t)
	spec.Image = nucleus.Image{Kind: "directory", Path: image}
	m, guest := host.Create(t, spec)
	for _, uid := range []int{-1, m.Facts().ToolsUID, m.Facts().AgentUID} {
		for _, name := range []string{"/usr/share/group", "/usr/share/owner", "/usr/share/none", "/usr/private/inside", "/etc/private", "/etc/link"} {
			if reply := guest.Try(script.Action{Do: "read", Path: name, UID: uid}); reply.Data != "" {
				t.Errorf("user %d reads %s", uid, name)
			}
		}
		for _, name := range []string{"/usr/share/public", "/etc/public", "/home/somebody/public"} { // control
			if got := guest.Must(script.Action{Do: "read", Path: name, UID: uid}); got != "content" {
				t.Errorf("user %d, %s: %q", uid, name, got)
			}
		}
	}
	if got := guest.Must(script.Action{Do: "list", Path: nucleus.MachineHome, UID: -1}); got != "workspace" {
		t.Errorf("%s holds %q", nucleus.MachineHome, got)
	}
	if _, err := os.Lstat(filepath.Join(image, "proc")); !os.IsNotExist(err) {
		t.Errorf("the image was written to: %v", err)
	}
}

// tryReadOnly tries a machine with layers, from inside.
func tryReadOnly(t *testing.T, m machine.Machine, guest *Guest) {
	t.Helper()
	for _, uid := range []int{-1, m.Facts().ToolsUID} {
		for _, dir := range []string{"/", "/usr", "/usr/bin", "/bin", "/etc", "/etc/ssl/certs", "/opt/leak", nucleus.MachineAgent, nucleus.MachineAgent + "/0", "/.nucleus", "/sys"} {
			guest.MustFail(script.Action{Do: "write", Path: dir + "/cal-test-intruder", UID: uid})
		}
		guest.MustFail(script.Action{Do: "write", Path: nucleus.MachineProxy, Data: "x", UID: uid})
		for _, dir := range []string{"/tmp", nucleus.MachineHome, nucleus.MachineWorkspace} { // control
			guest.Must(script.Action{Do: "write", Path: dir + "/mine", UID: m.Facts().ToolsUID})
			guest.Must(script.Action{Do: "remove", Path: dir + "/mine", UID: m.Facts().ToolsUID})
		}
	}
	// The machine's root may mount what it likes: the host's side stays read-only.
	for _, dir := range []string{"/usr", "/opt/leak"} {
		guest.Try(script.Action{Do: "remount", Path: dir, UID: -1})
		guest.MustFail(script.Action{Do: "write", Path: dir + "/cal-test-intruder", UID: -1})
	}
}

// testDoors puts things into the workspace that would lead out of it.
func testDoors(t *testing.T, host Host) {
	if host.Disk {
		t.Skip("no file of the host is in a workspace that is a disk; its doors are tried with the host's files")
	}
	spec := host.Spec(t)
	must(t, os.Chmod(filepath.Dir(spec.Workspace), 0o755))
	socket := filepath.Join(spec.Workspace, "s")
	unixDoor, err := net.Listen("unix", socket)
	must(t, err)
	defer unixDoor.Close()
	must(t, os.Chmod(socket, 0o777))
	tcpDoor, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer tcpDoor.Close()
	must(t, syscall.Mkfifo(filepath.Join(spec.Workspace, "f"), 0o666))
	must(t, os.Symlink("/etc/hostname", filepath.Join(spec.Workspace, "l")))
	for _, dial := range [][2]string{{"unix", socket}, {"tcp", tcpDoor.Addr().String()}} { // control
		conn, err := net.Dial(dial[0], dial[1])
		must(t, err)
		conn.Close()
	}
	m, guest := host.Create(t, spec)
	tools := m.Facts().ToolsUID
	for _, uid := range []int{-1, tools} {
		guest.MustFail(script.Action{Do: "dial", Data: "unix", Path: nucleus.MachineWorkspace + "/s", UID: uid})
		guest.MustFail(script.Action{Do: "dial", Data: "tcp", Path: tcpDoor.Addr().String(), UID: uid})
		guest.MustFail(script.Action{Do: "write", Path: nucleus.MachineWorkspace + "/f", UID: uid})
		guest.MustFail(script.Action{Do: "mknod", Path: nucleus.MachineWorkspace + "/disk", UID: uid})
	}
	if got := guest.Must(script.Action{Do: "read", Path: nucleus.MachineWorkspace + "/l", UID: -1}); got != "cal\n" {
		t.Errorf("a link out of the workspace shows %q, want the machine's own file", got)
	}
	guest.Must(script.Action{Do: "link", Path: nucleus.MachineWorkspace + "/out", Data: spec.Dir, UID: tools})
	if got := guest.Try(script.Action{Do: "list", Path: nucleus.MachineWorkspace + "/out/", UID: -1}); got.Err == "" {
		t.Errorf("a link reaches the host: %q", got.Data)
	}
}

// tryDoorsOfDisk is the same where the workspace is a disk: no name in it can be one of
// the host's, and the machine's root may make devices on it that nobody can use.
func tryDoorsOfDisk(t *testing.T, spec machine.Spec, m machine.Machine, guest *Guest) {
	t.Helper()
	door, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer door.Close()
	tcpDoor := door.Addr().String()
	conn, err := net.Dial("tcp", tcpDoor) // control
	must(t, err)
	conn.Close()
	tools := m.Facts().ToolsUID
	disk := nucleus.MachineWorkspace + "/disk"
	guest.MustFail(script.Action{Do: "mknod", Path: disk, UID: tools})
	guest.Try(script.Action{Do: "mknod", Path: disk, UID: -1})
	for _, uid := range []int{-1, tools} {
		guest.MustFail(script.Action{Do: "read", Path: disk, UID: uid})
		guest.MustFail(script.Action{Do: "dial", Data: "tcp", Path: tcpDoor, UID: uid})
		guest.MustFail(script.Action{Do: "list", Path: spec.Dir, UID: uid})
	}
	// Vsock reaches the host's side alone, and nothing there listens.
	guest.MustFail(script.Action{Do: "vsock", N: 1024, UID: -1})
	guest.MustFail(script.Action{Do: "vsock", N: 22, UID: -1})
}

// testWorkspaceKinds: a workspace that a driver of the other kind made is refused, and
// left as it is.
func testWorkspaceKinds(t *testing.T, host Host) {
	spec := host.Spec(t)
	name := site.WorkspaceDisk
	if host.Disk {
		name = "main.go"
	}
	must(t, os.WriteFile(filepath.Join(spec.Workspace, name), []byte("work"), 0o600))
	m, err := host.Driver().Create(Context(t), spec)
	if err == nil {
		host.destroy(t, m, spec.Dir)
	}
	if !errors.Is(err, machine.ErrRefused) || !strings.Contains(err.Error(), "cal repo fetch") {
		t.Errorf("a workspace that holds %s: %v", name, err)
	}
	if data, err := os.ReadFile(filepath.Join(spec.Workspace, name)); err != nil || string(data) != "work" {
		t.Errorf("%s was changed: %q, %v", name, data, err)
	}
	if entries, err := os.ReadDir(spec.Dir); err != nil || len(entries) != 0 {
		t.Errorf("left in the directory: %v, %v", entries, err)
	}
}

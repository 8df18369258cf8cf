package notify

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"
)

// sessionBus is a real message bus of its own.
func sessionBus(t *testing.T) (address string) {
	t.Helper()
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		t.Skip("no dbus-daemon (apt install dbus), which is the session's bus here")
	}
	cmd := exec.Command("dbus-daemon", "--session", "--nofork", "--nopidfile", "--print-address=1", "--address=unix:path="+filepath.Join(t.TempDir(), "bus"))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	address, err = bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(address)
}

// server is what a desktop has: it keeps what it is to show.
type server struct{ shown chan string }

func (s server) Notify(app string, replaces uint32, icon, title, body string, actions []string, hints map[string]dbus.Variant, timeout int32) (uint32, *dbus.Error) {
	s.shown <- fmt.Sprintf("%s|%d|%s|%s|%s|%d actions|%d hints", app, replaces, icon, title, body, len(actions), len(hints))
	return 1, nil
}

func TestDesktop(t *testing.T) {
	address := sessionBus(t)
	get := func(name string) string { return map[string]string{"DBUS_SESSION_BUS_ADDRESS": address}[name] }
	if err := Desktop(t.Context(), note, get); err == nil || !strings.Contains(err.Error(), "org.freedesktop.Notifications") {
		t.Errorf("on a bus where nobody shows notifications: %v", err)
	}
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s := server{make(chan string, 4)}
	if err := conn.Export(s, "/org/freedesktop/Notifications", "org.freedesktop.Notifications"); err != nil {
		t.Fatal(err)
	}
	if reply, err := conn.RequestName("org.freedesktop.Notifications", dbus.NameFlagDoNotQueue); err != nil || reply != dbus.RequestNameReplyPrimaryOwner {
		t.Fatal(reply, err)
	}
	if err := Desktop(t.Context(), note, get); err != nil {
		t.Fatal(err)
	}
	if got, want := <-s.shown, "CAL|0||CAL: an approval is wanted|git_push in pod p-1: cal approve a-1|0 actions|0 hints"; got != want {
		t.Errorf("shown %q, want %q", got, want)
	}
}

// No bus is started, and none is an error that says so.
func TestNoBus(t *testing.T) {
	none := func(string) string { return "" }
	if HasDesktop(none) {
		t.Error("a desktop without a bus")
	}
	if err := Desktop(t.Context(), note, none); err == nil || !strings.Contains(err.Error(), "no session bus") {
		t.Error(err)
	}
	dir := t.TempDir()
	runtime := func(name string) string { return map[string]string{"XDG_RUNTIME_DIR": dir}[name] }
	if err := os.WriteFile(filepath.Join(dir, "bus"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if HasDesktop(runtime) {
		t.Error("a file is taken for a bus")
	}
	if err := os.Remove(filepath.Join(dir, "bus")); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "bus"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if !HasDesktop(runtime) {
		t.Error("the bus of XDG_RUNTIME_DIR is not found")
	}
}

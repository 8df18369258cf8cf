// Package machinetest is the conformance suite of drivers: what every driver
// owes, tried from both ends of the wire.
//
// Each wall is tried from the inside by a guest that does what it is told, and
// beside each a positive control shows that the same attempt succeeds where the
// wall has a door.
package machinetest

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/internal/idmap"
	"cal/machine"
	"cal/machine/machinetest/script"
	"cal/nucleus"
)

// Host is a host with one driver under test.
type Host struct {
	// Driver returns a driver as a process that was just started would have it.
	Driver func() machine.Driver

	// Proxy is the test guest, as TestGuest builds it.
	Proxy string

	// Image is of every machine for which a test needs no special one; without a kind: the
	// host's programs.
	Image nucleus.Image

	// Scratch is an existing directory, absolute, with a short path.
	Scratch string

	// Disk says that a workspace is a disk of the machine's own (machine.Facts.Sync). What is
	// in it is then read off the disk.
	Disk bool

	// Read reads a file of a workspace, which the machine's users may own. nil:
	// everybody who tests can.
	Read func(path string) ([]byte, error)

	// Copy returns a copy of a workspace, true but for its owners, that the tester can
	// read; nil: the workspace itself is.
	Copy func(t *testing.T, workspace string) string

	// Kill does to the machine of a directory what kill -9 of its sandbox does.
	Kill func(t *testing.T, dir string)

	// Left lists what is left on the host of a machine that was in dir: processes,
	// mounts, cgroups. nil: nothing can be.
	Left func(t *testing.T, dir string) []string
}

// patience is how long a machine may take for one thing; longer where all is emulated
// twice.
var patience = func() time.Duration {
	if longer, err := time.ParseDuration(os.Getenv("CAL_TEST_PATIENCE")); err == nil {
		return longer
	}
	return 90 * time.Second
}()

var tests = []struct {
	name string
	try  func(*testing.T, Host)
}{
	{"refused", testRefused},
	{"limits are stated", testLimits},
	{"life", testLife},
	{"workspace survives kill", testKill},
	{"new wire", testRewire},
	{"adopt", testAdopt},
	{"remove", testRemove},
	{"several", testSeveral},
	{"workspace of another kind", testWorkspaceKinds},
	{"walls", testWalls},
}

// Names are those of the tests that Run runs.
func Names() (names []string) {
	for _, test := range tests {
		names = append(names, test.name)
	}
	return names
}

// Run tries everything.
func Run(t *testing.T, host Host) { Try(t, host, Names()...) }

// Try is Run of the named tests alone, for a driver whose guest is not a whole one.
func Try(t *testing.T, host Host, names ...string) {
	for _, name := range names {
		if !slices.Contains(Names(), name) {
			t.Errorf("there is no test %q", name)
		}
	}
	for _, test := range tests {
		if slices.Contains(names, test.name) {
			t.Run(test.name, func(t *testing.T) { test.try(t, host) })
		}
	}
}

// Spec returns a small valid machine.
func (h Host) Spec(t testing.TB) machine.Spec {
	t.Helper()
	base, err := os.MkdirTemp(h.Scratch, "m")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := idmap.RemoveAll(context.Background(), base); err != nil {
			t.Errorf("removing workspace and machine: %v", err)
		}
	})
	spec := machine.Spec{
		ID: filepath.Base(base), Dir: filepath.Join(base, "d"), Workspace: filepath.Join(base, "ws"),
		Proxy: h.Proxy, Image: h.Image,
	}
	if spec.Image.Kind == "" {
		spec.Image.Kind = nucleus.ImageHost
	}
	for _, dir := range []string{spec.Dir, spec.Workspace} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return spec
}

func (h Host) read(path string) ([]byte, error) {
	switch {
	case h.Read != nil:
		return h.Read(path)
	case h.Disk:
		return readDisk(path)
	}
	return os.ReadFile(path)
}

func (h Host) copy(t *testing.T, workspace string) string {
	switch {
	case h.Copy != nil:
		return h.Copy(t, workspace)
	case h.Disk:
		return copyDisk(t, workspace)
	}
	return workspace
}

// Guest is a test's end of the wire.
type Guest struct {
	t       testing.TB
	conn    net.Conn
	decoder *json.Decoder
}

// Talk takes conn for the guest's wire.
func Talk(t testing.TB, conn net.Conn) *Guest {
	t.Helper()
	if conn == nil {
		t.Fatal("machine has no wire")
	}
	t.Cleanup(func() { conn.Close() })
	return &Guest{t, conn, json.NewDecoder(conn)}
}

// Try does an action and returns what came of it.
func (g *Guest) Try(action script.Action) script.Reply {
	g.t.Helper()
	reply, err := g.Send(action)
	if err != nil {
		g.t.Fatalf("%s %s: wire: %v", action.Do, action.Path, err)
	}
	return reply
}

// Send does an action; the error is the wire's.
func (g *Guest) Send(action script.Action) (script.Reply, error) {
	if err := g.Begin(action); err != nil {
		return script.Reply{}, err
	}
	return g.Finish()
}

// Close closes the wire.
func (g *Guest) Close() error { return g.conn.Close() }

// Begin sends an action, Finish waits for what came of it.
func (g *Guest) Begin(action script.Action) error {
	g.conn.SetDeadline(time.Now().Add(patience))
	return json.NewEncoder(g.conn).Encode(action)
}

// Finish is the other half of Begin.
func (g *Guest) Finish() (reply script.Reply, err error) {
	g.conn.SetDeadline(time.Now().Add(patience))
	err = g.decoder.Decode(&reply)
	return reply, err
}

// Must does an action that has to succeed.
func (g *Guest) Must(action script.Action) string {
	g.t.Helper()
	reply := g.Try(action)
	if reply.Err != "" {
		g.t.Fatalf("%+v: %s (%s)", action, reply.Err, reply.Data)
	}
	return reply.Data
}

// MustFail does an action that has to fail.
func (g *Guest) MustFail(action script.Action) {
	g.t.Helper()
	if reply := g.Try(action); reply.Err == "" {
		g.t.Errorf("%+v succeeded: %q", action, reply.Data)
	}
}

// Context ends with the test's patience.
func Context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// Create makes a machine that is destroyed with the test.
func (h Host) Create(t *testing.T, spec machine.Spec) (machine.Machine, *Guest) {
	t.Helper()
	m, err := h.Driver().Create(Context(t), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.destroy(t, m, spec.Dir) })
	return m, Talk(t, m.Wire())
}

func (h Host) destroy(t *testing.T, m machine.Machine, dir string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := m.Destroy(ctx); err != nil {
		t.Errorf("destroy: %v", err)
	}
	h.nothingLeft(t, dir)
}

func (h Host) nothingLeft(t *testing.T, dir string) {
	t.Helper()
	if h.Left == nil {
		return
	}
	if left := h.Left(t, dir); len(left) > 0 {
		t.Errorf("left of %s: %s", dir, strings.Join(left, "; "))
	}
}

func wait(t *testing.T, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s did not happen within %s", what, patience)
	}
}

func echo(data string) script.Action { return script.Action{Do: "echo", Data: data, UID: -1} }

func testLife(t *testing.T, host Host) {
	spec := host.Spec(t)
	m, guest := host.Create(t, spec)
	if m.Wire() != nil {
		t.Error("the wire was handed over twice")
	}
	if got := guest.Must(echo("hello")); got != "hello" {
		t.Errorf("echo: %q", got)
	}
	facts := m.Facts()
	if facts.AgentUID == facts.ToolsUID || facts.AgentUID == 0 || facts.OneID != (facts.ToolsUID == 0) || facts.Env["PATH"] == "" {
		t.Errorf("facts: %+v", facts)
	}
	for _, limit := range m.Limits() {
		bounded := limit.Resource == "memory" || limit.Resource == "pids"
		if bounded && host.Driver().Tier() != nucleus.TierNone && limit.How == machine.Unlimited {
			t.Errorf("without a limit in the Spec: %+v", limit)
		}
	}
	guest.Must(script.Action{Do: "write", Path: nucleus.MachineWorkspace + "/by-tools", Data: "1", UID: facts.ToolsUID})
	if data, err := host.read(spec.Workspace + "/by-tools"); err != nil || string(data) != "1" {
		t.Errorf("workspace on the host: %q, %v", data, err)
	}
	ctx := Context(t)
	if err := m.Destroy(ctx); err != nil {
		t.Fatal(err)
	}
	wait(t, "Done", m.Done())
	if _, err := guest.Send(echo("")); err == nil {
		t.Error("a destroyed machine answers")
	}
	if _, err := os.Lstat(spec.Dir); !os.IsNotExist(err) {
		t.Errorf("machine directory is left: %v", err)
	}
	if _, err := host.read(spec.Workspace + "/by-tools"); err != nil {
		t.Errorf("workspace did not stay: %v", err)
	}
	if err := m.Destroy(ctx); err != nil {
		t.Errorf("destroy again: %v", err)
	}
}

func testRewire(t *testing.T, host Host) {
	m, guest := host.Create(t, host.Spec(t))
	refusedWire(t, m) // at once: it is never taken for the first
	guest.Must(script.Action{Do: "set", Data: "same machine", UID: -1})
	refusedWire(t, m)
	guest.Must(echo("the old wire stays"))
	guest.conn.Close()
	for range 2 {
		conn, err := m.Rewire(Context(t))
		if err != nil {
			t.Fatal(err)
		}
		again := Talk(t, conn)
		again.Must(echo(script.Proof))
		if got := again.Must(script.Action{Do: "get", UID: -1}); got != "same machine" {
			t.Errorf("after the new wire: %q", got)
		}
	}
}

// refusedWire has a stranger take a new wire.
func refusedWire(t *testing.T, m machine.Machine) {
	t.Helper()
	conn, err := m.Rewire(Context(t))
	if err != nil {
		t.Fatal(err)
	}
	stranger := Talk(t, conn)
	defer conn.Close()
	if _, err := stranger.Send(echo("no proof of mine")); err == nil || !strings.Contains(err.Error(), "did not take the new wire") {
		t.Errorf("a stranger's wire: %v", err)
	}
}

func testAdopt(t *testing.T, host Host) {
	spec := host.Spec(t)
	m, guest := host.Create(t, spec)
	guest.Must(script.Action{Do: "set", Data: "lives on", UID: -1})
	var group sync.WaitGroup
	for name, try := range map[string]func() error{
		"adopted":    func() error { _, err := host.Driver().Adopt(Context(t), spec.Dir); return err },
		"removed":    func() error { return host.Driver().Remove(Context(t), spec.Dir) },
		"made again": func() error { _, err := host.Driver().Create(Context(t), spec); return err },
	} {
		group.Go(func() {
			if try() == nil {
				t.Errorf("a machine that is held was %s", name)
			}
		})
	}
	group.Wait()
	guest.Must(echo("still here"))
	m.Release()
	if _, err := host.Driver().Create(Context(t), spec); err == nil {
		t.Fatal("a second machine was made in the directory of one that runs")
	}
	adopted, err := host.Driver().Adopt(Context(t), spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.destroy(t, adopted, spec.Dir) })
	again := Talk(t, adopted.Wire())
	again.Must(echo(script.Proof))
	if got := again.Must(script.Action{Do: "get", UID: -1}); got != "lives on" {
		t.Errorf("after adoption: %q", got)
	}
	if adopted.Facts().ToolsUID != m.Facts().ToolsUID || len(adopted.Limits()) != len(machine.Resources) {
		t.Errorf("adopted facts %+v, limits %v", adopted.Facts(), adopted.Limits())
	}
	host.Kill(t, spec.Dir)
	wait(t, "Done", adopted.Done())
	adopted.Release()
	if _, err := host.Driver().Adopt(Context(t), spec.Dir); !errors.Is(err, machine.ErrGone) {
		t.Errorf("adopting the dead: %v", err)
	}
	if err := host.Driver().Remove(Context(t), spec.Dir); err != nil {
		t.Errorf("removing the dead: %v", err)
	}
}

func testRemove(t *testing.T, host Host) {
	spec := host.Spec(t)
	if _, err := host.Driver().Adopt(Context(t), spec.Dir); !errors.Is(err, machine.ErrGone) {
		t.Errorf("adopting nothing: %v", err)
	}
	if err := host.Driver().Remove(Context(t), filepath.Join(spec.Dir, "never")); err != nil {
		t.Errorf("removing what never was: %v", err)
	}
	givenUp(t, host, spec)
	m, err := host.Driver().Create(Context(t), spec) // it can be tried again
	if err != nil {
		t.Fatal(err)
	}
	guest := Talk(t, m.Wire())
	guest.Must(echo(""))
	m.Release()
	own := filepath.Join(spec.Dir, "of-the-owner")
	if err := os.WriteFile(own, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := host.Driver().Remove(Context(t), spec.Dir); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := guest.Send(echo("")); err == nil {
		t.Error("a removed machine answers")
	}
	if entries, err := os.ReadDir(spec.Dir); err != nil || len(entries) != 1 {
		t.Errorf("directory with a file of its owner: %v, %v", entries, err)
	}
	os.Remove(own)
	if err := host.Driver().Remove(Context(t), spec.Dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(spec.Dir); !os.IsNotExist(err) {
		t.Errorf("machine directory is left: %v", err)
	}
	host.nothingLeft(t, spec.Dir)
}

// givenUp has a start end before it has begun.
func givenUp(t *testing.T, host Host, spec machine.Spec) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if m, err := host.Driver().Create(ctx, spec); err == nil {
		m.Destroy(Context(t))
		t.Fatal("created in spite of an ended context")
	}
	if entries, err := os.ReadDir(spec.Dir); err != nil || len(entries) != 0 {
		t.Errorf("left in the directory: %v, %v", entries, err)
	}
	host.nothingLeft(t, spec.Dir)
}

func testSeveral(t *testing.T, host Host) {
	const n = 2
	var group sync.WaitGroup
	machines, errs := make([]machine.Machine, n), make([]error, n)
	specs := make([]machine.Spec, n)
	driver := host.Driver()
	for i := range n {
		specs[i] = host.Spec(t)
		group.Go(func() { machines[i], errs[i] = driver.Create(Context(t), specs[i]) })
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	var guests []*Guest
	for i, m := range machines {
		t.Cleanup(func() { host.destroy(t, m, specs[i].Dir) })
		guests = append(guests, Talk(t, m.Wire()))
		guests[i].Must(script.Action{Do: "set", Data: specs[i].Dir, UID: -1})
		guests[i].Must(script.Action{Do: "write", Path: nucleus.MachineWorkspace + "/mine", Data: specs[i].Dir, UID: m.Facts().ToolsUID})
	}
	for i := range guests {
		read := guests[i].Must(script.Action{Do: "read", Path: nucleus.MachineWorkspace + "/mine", UID: -1})
		if got := guests[i].Must(script.Action{Do: "get", UID: -1}); got != specs[i].Dir || read != specs[i].Dir {
			t.Errorf("machine %d sees another's: %q, %q", i, got, read)
		}
	}
	host.Kill(t, specs[0].Dir)
	wait(t, "Done", machines[0].Done())
	guests[1].Must(echo("the other lives"))
}

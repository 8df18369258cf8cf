package testenv

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// Process is one that belongs to an Env.
type Process struct {
	PID  int
	Name string // of its program: nucleus-node, runsc-sandbox, runsc-gofer, ...
	Args []string
}

// Processes lists what runs for this CAL_HOME, found by the arguments: daemons,
// sandboxes and gofers name it there.
func (e *Env) Processes() []Process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		e.t.Fatal(err)
	}
	var found []Process
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		raw, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		if err != nil || !bytes.Contains(raw, []byte(e.CAL+"/")) && !bytes.Contains(raw, []byte(e.CAL+"\x00")) {
			continue
		}
		args := strings.Split(strings.TrimRight(string(raw), "\x00"), "\x00")
		found = append(found, Process{pid, filepath.Base(args[0]), args})
	}
	return found
}

// emulator is QEMU's name, of which one runs for each machine of that driver's.
const emulator = "qemu-system-x86_64"

// spares are the machines that no pod has yet.
func (e *Env) spares() []string {
	return names(filepath.Join(e.CAL, "run", "spares"))
}

// ofSpare reports whether text names one of the spares.
func ofSpare(text string, spares []string) bool {
	return slices.ContainsFunc(spares, func(id string) bool { return strings.Contains(text, id) })
}

// Sandboxes are the process ids of machines that a pod has.
func (e *Env) Sandboxes() []int {
	var pids []int
	spares := e.spares()
	for _, p := range e.Processes() {
		if (p.Name == "runsc-sandbox" || p.Name == emulator) && !ofSpare(strings.Join(p.Args, " "), spares) {
			pids = append(pids, p.PID)
		}
	}
	return pids
}

// Pods lists the pods that have a directory; a spare is none.
func (e *Env) Pods() []string {
	pods := names(filepath.Join(e.CAL, "run", "pods"))
	spares := e.spares()
	return slices.DeleteFunc(pods, func(name string) bool { return slices.Contains(spares, name) })
}

func names(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

func (e *Env) mounts() []string {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		e.t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(raw)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], e.CAL+"/") {
			found = append(found, fields[4])
		}
	}
	slices.Reverse(found)
	return found
}

// Left says what of machines and daemons is still there: processes, mounts, pods,
// spares, roots and cgroups.
func (e *Env) Left() []string {
	var left []string
	for _, id := range e.spares() {
		left = append(left, "spare "+id)
		left = append(left, traces(id)...)
	}
	for _, p := range e.Processes() {
		left = append(left, fmt.Sprintf("process %d: %s", p.PID, strings.Join(p.Args, " ")))
	}
	return append(left, e.LeftOfMachines()...)
}

// LeftOfMachines is Left without what goes on between runs: the daemons and the
// node's spare machine.
func (e *Env) LeftOfMachines() []string {
	var left []string
	spares := e.spares()
	for _, p := range e.Processes() {
		if (strings.HasPrefix(p.Name, "runsc") || p.Name == emulator) && !ofSpare(strings.Join(p.Args, " "), spares) {
			left = append(left, fmt.Sprintf("process %d: %s", p.PID, strings.Join(p.Args, " ")))
		}
	}
	for _, m := range e.mounts() {
		if !ofSpare(m, spares) {
			left = append(left, "mount "+m)
		}
	}
	for _, name := range e.Pods() {
		left = append(left, "pod "+name)
		left = append(left, traces(name)...)
	}
	for _, name := range names(filepath.Join(e.CAL, "run", "probes")) {
		if name != "cal-empty-root" { // of all probes, see site.Trial
			left = append(left, "what a probe made: "+name)
		}
	}
	for _, id := range e.podsOfLog() {
		left = append(left, traces(id)...)
	}
	slices.Sort(left)
	return slices.Compact(left)
}

// podsOfLog lists every pod that this node has ever made.
func (e *Env) podsOfLog() []string {
	if _, err := os.Stat(filepath.Join(e.CAL, "log")); err != nil {
		return nil
	}
	var ids []string
	for _, entry := range e.Log() {
		if entry.Pod != "" && !slices.Contains(ids, entry.Pod) {
			ids = append(ids, entry.Pod)
		}
	}
	return ids
}

// traces finds what a machine of root's leaves outside CAL_HOME.
func traces(pod string) []string {
	var found []string
	for _, pattern := range []string{"/run/cal/" + pod + "-*", "/sys/fs/cgroup/cal-" + pod + "-*", "/sys/fs/cgroup/*/cal-" + pod + "-*"} {
		names, err := filepath.Glob(pattern)
		if err == nil {
			found = append(found, names...)
		}
	}
	return found
}

// Output keeps what a program prints, at most its first and last part.
type Output struct {
	mu      sync.Mutex
	text    []byte
	total   int64
	changed chan struct{}
}

func newOutput() *Output { return &Output{changed: make(chan struct{})} }

const outputMost = 8 << 20

func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.total += int64(len(p))
	if room := outputMost - len(o.text); room > 0 {
		o.text = append(o.text, p[:min(room, len(p))]...)
	}
	close(o.changed)
	o.changed = make(chan struct{})
	return len(p), nil
}

func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.text)
}

// Total is how many bytes were printed.
func (o *Output) Total() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.total
}

func (o *Output) look(text string) (bool, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return bytes.Contains(o.text, []byte(text)), o.changed
}

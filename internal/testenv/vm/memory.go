package vm

import (
	"encoding/json"
	"time"
)

// Save writes the machine's memory and its devices to a file, and ends it. Machines that are started with
// Config.Memory go on from there; what is on their disks is another matter.
func (m *Machine) Save(path string) {
	m.t.Helper()
	monitor := m.monitor()
	monitor.do("stop", nil)
	monitor.do("migrate", map[string]any{"uri": "exec:cat >" + path})
	monitor.await("query-migrate", "completed")
	m.Kill()
}

// goOn lets a machine that was started from a memory run.
func (m *Machine) goOn() {
	m.t.Helper()
	monitor := m.monitor()
	monitor.await("query-status", "paused")
	monitor.do("cont", nil)
}

// monitor speaks to QEMU.
type monitor struct {
	m    *Machine
	says *json.Decoder
	told *json.Encoder
}

func (m *Machine) monitor() monitor {
	m.t.Helper()
	conn := m.Dial("qmp")
	conn.SetDeadline(time.Now().Add(Patience))
	q := monitor{m, json.NewDecoder(conn), json.NewEncoder(conn)}
	q.do("qmp_capabilities", nil)
	return q
}

// status is what of an answer is of interest.
type status struct {
	Status string `json:"status"`
}

func (q monitor) do(command string, arguments map[string]any) status {
	q.m.t.Helper()
	question := map[string]any{"execute": command}
	if arguments != nil {
		question["arguments"] = arguments
	}
	if err := q.told.Encode(question); err != nil {
		q.m.t.Fatal(err)
	}
	for {
		var answer struct {
			Return *status
			Error  *struct{ Desc string }
		}
		if err := q.says.Decode(&answer); err != nil {
			q.m.t.Fatalf("QEMU, %s: %v", command, err)
		}
		switch { // else it is an event
		case answer.Error != nil:
			q.m.t.Fatalf("QEMU, %s: %s", command, answer.Error.Desc)
		case answer.Return != nil:
			return *answer.Return
		}
	}
}

// await asks until the status is what is wanted.
func (q monitor) await(command, want string) {
	q.m.t.Helper()
	for deadline := time.Now().Add(Patience); ; time.Sleep(10 * time.Millisecond) {
		got := q.do(command, nil).Status
		if got == want {
			return
		}
		if got == "failed" || time.Now().After(deadline) {
			q.m.t.Fatalf("QEMU, %s: %q, want %q", command, got, want)
		}
	}
}

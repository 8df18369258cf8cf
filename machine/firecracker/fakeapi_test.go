package firecracker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// fakeAPI is Firecracker's API with no machine behind it: it has the states, the order
// and the words of the real one, and refuses what the real one refuses. What a state
// change does is up to its owner.
type fakeAPI struct {
	root    string // where the paths in requests lie
	id      string
	onStart func(fakeConfig) error // a guest begins to run
	onPause func(paused bool)

	mu       sync.Mutex
	state    string // "Not started", "Running", "Paused"
	bootPath bool   // boot-specific resources were set
	config   fakeConfig
	requests []string // method, path and body of all that came
}

// fakeConfig is what was configured, by path.
type fakeConfig map[string]json.RawMessage

// faultf is an error in Firecracker's own words.
func faultf(format string, args ...any) error { return fmt.Errorf(format, args...) }

var (
	errPreBoot  = faultf("The requested operation is not supported before starting the microVM.")
	errPostBoot = faultf("The requested operation is not supported after starting the microVM.")
)

func newFakeAPI(root, id string) *fakeAPI {
	return &fakeAPI{root: root, id: id, state: "Not started", config: fakeConfig{}, onStart: func(fakeConfig) error { return nil }, onPause: func(bool) {}}
}

// ServeHTTP panics where its own answer is not as described: a fake that lies is worse
// than none.
func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(err)
	}
	status, answer := f.answer(r.Method, r.URL.Path, body)
	if described().checkRequest(r.Method, r.URL.Path, body) == nil {
		if err := described().checkAnswer(r.Method, r.URL.Path, status, answer); err != nil {
			panic(fmt.Sprintf("%s %s: %v", r.Method, r.URL.Path, err))
		}
	}
	w.WriteHeader(status)
	_, _ = w.Write(answer)
}

func (f *fakeAPI) answer(method, path string, body []byte) (int, []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests = append(f.requests, fmt.Sprintf("%s %s %s", method, path, body))
	err := described().checkRequest(method, path, body)
	if err == nil && method == http.MethodGet && path == "/" {
		info, _ := json.Marshal(map[string]string{"app_name": "Firecracker", "id": f.id, "state": f.state, "vmm_version": Version})
		return http.StatusOK, info
	}
	if err == nil {
		err = f.do(method, path, body)
	}
	if err != nil {
		fault, _ := json.Marshal(map[string]string{"fault_message": err.Error()})
		return http.StatusBadRequest, fault
	}
	return http.StatusNoContent, nil
}

func (f *fakeAPI) do(method, path string, body []byte) error {
	switch {
	case method+path == "PATCH/vm" || path == "/snapshot/create":
		if f.state == "Not started" {
			return errPreBoot
		}
	case strings.HasPrefix(path, "/drives/"):
		if f.state != "Not started" {
			return faultf("PCI is not enabled")
		}
	case f.state != "Not started":
		return errPostBoot
	}
	do, ok := fakeOperations[method+" "+described().template(path)]
	if !ok {
		return fmt.Errorf("the fake has no %s %s", method, path)
	}
	if err := do(f, path, body); err != nil {
		return err
	}
	f.config[path] = body
	return nil
}

var fakeOperations = map[string]func(f *fakeAPI, path string, body []byte) error{
	"PUT /machine-config":    func(f *fakeAPI, _ string, body []byte) error { return f.setMachine(body) },
	"PUT /boot-source":       func(f *fakeAPI, _ string, body []byte) error { return f.setBoot(body) },
	"PUT /drives/{drive_id}": func(f *fakeAPI, path string, body []byte) error { return f.addDrive(path, body) },
	"PUT /vsock":             func(f *fakeAPI, _ string, body []byte) error { return f.setVsock(body) },
	"PUT /serial":            func(*fakeAPI, string, []byte) error { return nil },
	"PUT /actions":           func(f *fakeAPI, _ string, body []byte) error { return f.act(body) },
	"PATCH /vm":              func(f *fakeAPI, _ string, body []byte) error { return f.setState(body) },
	"PUT /snapshot/create":   func(f *fakeAPI, _ string, body []byte) error { return f.saveSnapshot(body) },
	"PUT /snapshot/load":     func(f *fakeAPI, _ string, body []byte) error { return f.loadSnapshot(body) },
}

func (f *fakeAPI) setMachine(body []byte) error {
	f.bootPath = true
	var m struct {
		SMT  bool  `json:"smt"`
		CPUs uint8 `json:"vcpu_count"`
		Mem  int   `json:"mem_size_mib"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return err
	}
	if m.Mem <= 0 {
		return faultf("Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size.")
	}
	return nil
}

func (f *fakeAPI) setBoot(body []byte) error {
	f.bootPath = true
	var b bootSource
	if err := json.Unmarshal(body, &b); err != nil {
		return err
	}
	for what, path := range map[string]string{"kernel": b.Kernel, "initrd": b.Initrd} {
		if err := f.opens(path, os.O_RDONLY); err != nil && path+what != "initrd" {
			return faultf("Boot source error: The %s file cannot be opened: %w", what, err)
		}
	}
	if len(b.Cmdline) >= 2048 {
		return faultf("Boot source error: The kernel command line is invalid: TooLarge")
	}
	return nil
}

func (f *fakeAPI) addDrive(path string, body []byte) error {
	var d drive
	if err := json.Unmarshal(body, &d); err != nil {
		return err
	}
	id := strings.TrimPrefix(path, "/drives/")
	if strings.Trim(id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") != "" {
		return faultf("API Resource IDs can only contain alphanumeric characters and underscores.")
	}
	if id != d.ID {
		return faultf("The id from the path does not match the id from the body!")
	}
	f.bootPath = true
	mode := os.O_RDWR
	if d.ReadOnly {
		mode = os.O_RDONLY
	}
	if err := f.opens(d.Path, mode); err != nil {
		return faultf("Drive config error: Unable to create the virtio block device: Virtio backend error: Error manipulating the backing file: %w %s", err, d.Path)
	}
	return nil
}

func (f *fakeAPI) setVsock(body []byte) error {
	f.bootPath = true
	var v vsockDevice
	if err := json.Unmarshal(body, &v); err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Join(f.root, v.Path)); err == nil {
		return faultf("Vsock config error: Cannot create backend for vsock device: Error binding to the host-side Unix socket: Address in use (os error 98)")
	}
	return nil
}

func (f *fakeAPI) act(body []byte) error {
	if !strings.Contains(string(body), "InstanceStart") {
		return errPreBoot
	}
	if f.config["/boot-source"] == nil {
		return faultf("Start microvm error: Cannot start microvm without kernel configuration.")
	}
	if err := f.onStart(f.config); err != nil {
		return err
	}
	f.state = "Running"
	return nil
}

func (f *fakeAPI) setState(body []byte) error {
	f.state = "Running"
	if strings.Contains(string(body), "Paused") {
		f.state = "Paused"
	}
	f.onPause(f.state == "Paused")
	return nil
}

func (f *fakeAPI) saveSnapshot(body []byte) error {
	if f.state != "Paused" {
		return faultf("Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable while running")
	}
	var s snapshotCreate
	if err := json.Unmarshal(body, &s); err != nil {
		return err
	}
	config, err := json.Marshal(f.config)
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(filepath.Join(f.root, s.State), config, 0o600), os.WriteFile(filepath.Join(f.root, s.Memory), []byte("memory"), 0o600))
}

func (f *fakeAPI) loadSnapshot(body []byte) error {
	if f.bootPath {
		return faultf("Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.")
	}
	var s snapshotLoad
	if err := json.Unmarshal(body, &s); err != nil {
		return err
	}
	if s.Backend.Path == "" {
		return faultf("An error occurred when deserializing the json body of a request: missing field: either `mem_backend` or `mem_file_path` is required.")
	}
	if err := f.opens(s.Backend.Path, os.O_RDONLY); err != nil {
		return faultf("Load snapshot error: Failed to restore from snapshot: Failed to load guest memory: %w", err)
	}
	saved, err := os.ReadFile(filepath.Join(f.root, s.State))
	if err != nil {
		return faultf("Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state from file: %w", err)
	}
	config := fakeConfig{}
	if err := json.Unmarshal(saved, &config); err != nil {
		return faultf("Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state from file: %w", err)
	}
	for path, body := range config {
		var d drive
		if strings.HasPrefix(path, "/drives/") && json.Unmarshal(body, &d) == nil {
			if err := f.opens(d.Path, os.O_RDONLY); err != nil {
				return faultf("Load snapshot error: Failed to restore from snapshot: %w", err)
			}
		}
	}
	f.state = "Paused"
	f.onPause(true)
	return f.onStart(config)
}

// opens says whether a path of the jail's can be opened.
func (f *fakeAPI) opens(path string, flags int) error {
	file, err := os.OpenFile(filepath.Join(f.root, path), flags, 0)
	if err != nil {
		return err
	}
	return file.Close()
}

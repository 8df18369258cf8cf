package firecracker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
)

// What is said to Firecracker's API. Fields and their meaning are those of its own
// description, a copy of which lies in testdata and against which the tests hold
// every request.
type (
	instanceInfo struct {
		ID      string `json:"id"`
		State   string `json:"state"` // "Not started", "Running", "Paused"
		Version string `json:"vmm_version"`
	}

	machineConfig struct {
		CPUs     int `json:"vcpu_count"`
		MemoryMB int `json:"mem_size_mib"`
	}

	bootSource struct {
		Kernel  string `json:"kernel_image_path"`
		Initrd  string `json:"initrd_path,omitempty"`
		Cmdline string `json:"boot_args"`
	}

	drive struct {
		ID       string       `json:"drive_id"`
		Path     string       `json:"path_on_host"`
		Root     bool         `json:"is_root_device"` // never: the kernel is told nothing of a root
		ReadOnly bool         `json:"is_read_only"`
		Cache    string       `json:"cache_type"` // "Unsafe" does not keep what a guest flushed
		Limit    *rateLimiter `json:"rate_limiter,omitempty"`
	}

	rateLimiter struct {
		Bandwidth *tokenBucket `json:"bandwidth,omitempty"` // bytes
		Ops       *tokenBucket `json:"ops,omitempty"`
	}

	// tokenBucket refills Size in Refill milliseconds.
	tokenBucket struct {
		Size   int64 `json:"size"`
		Burst  int64 `json:"one_time_burst,omitempty"`
		Refill int64 `json:"refill_time"`
	}

	vsockDevice struct {
		CID  uint32 `json:"guest_cid"`
		Path string `json:"uds_path"`
	}

	serialDevice struct {
		Path  string       `json:"serial_out_path"`
		Limit *tokenBucket `json:"rate_limiter,omitempty"`
	}

	snapshotCreate struct {
		Kind   string `json:"snapshot_type"` // "Diff"
		State  string `json:"snapshot_path"`
		Memory string `json:"mem_file_path"`
	}

	snapshotLoad struct {
		State   string        `json:"snapshot_path"`
		Backend memoryBackend `json:"mem_backend"`
	}

	memoryBackend struct {
		Kind string `json:"backend_type"` // "File"
		Path string `json:"backend_path"`
	}
)

// mostAnswer bounds what is read of an answer: behind the socket may be a
// Firecracker that its guest has taken over.
const mostAnswer = 64 << 10

// api speaks to one Firecracker.
type api struct{ client *http.Client }

// newAPI returns an API whose connections come from dial.
func newAPI(dial func(context.Context) (net.Conn, error)) *api {
	return &api{&http.Client{
		Transport: &http.Transport{
			DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
			DisableKeepAlives: true, // the server keeps ten connections and drops the eleventh
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("firecracker redirects") },
	}}
}

func (a *api) info(ctx context.Context) (info instanceInfo, err error) {
	err = a.call(ctx, http.MethodGet, "/", nil, &info)
	return info, err
}

func (a *api) setMachine(ctx context.Context, m machineConfig) error {
	return a.call(ctx, http.MethodPut, "/machine-config", m, nil)
}

func (a *api) setBoot(ctx context.Context, b bootSource) error {
	return a.call(ctx, http.MethodPut, "/boot-source", b, nil)
}

func (a *api) addDrive(ctx context.Context, d drive) error {
	return a.call(ctx, http.MethodPut, "/drives/"+d.ID, d, nil)
}

func (a *api) setVsock(ctx context.Context, v vsockDevice) error {
	return a.call(ctx, http.MethodPut, "/vsock", v, nil)
}

func (a *api) setSerial(ctx context.Context, s serialDevice) error {
	return a.call(ctx, http.MethodPut, "/serial", s, nil)
}

func (a *api) start(ctx context.Context) error {
	return a.call(ctx, http.MethodPut, "/actions", map[string]string{"action_type": "InstanceStart"}, nil)
}

func (a *api) pause(ctx context.Context) error { return a.setState(ctx, "Paused") }

func (a *api) resume(ctx context.Context) error { return a.setState(ctx, "Resumed") }

func (a *api) setState(ctx context.Context, state string) error {
	return a.call(ctx, http.MethodPatch, "/vm", map[string]string{"state": state}, nil)
}

func (a *api) saveSnapshot(ctx context.Context, s snapshotCreate) error {
	return a.call(ctx, http.MethodPut, "/snapshot/create", s, nil)
}

// loadSnapshot leaves the machine paused.
func (a *api) loadSnapshot(ctx context.Context, s snapshotLoad) error {
	return a.call(ctx, http.MethodPut, "/snapshot/load", s, nil)
}

// apiError is a refusal by Firecracker, in its words.
type apiError struct {
	Method, Path, Status, Fault string
}

func (e *apiError) Error() string {
	return fmt.Sprintf("firecracker: %s %s: %s: %s", e.Method, e.Path, e.Status, e.Fault)
}

// call does one request. Anything but success and a body where one is wanted is an
// error; so is a success with a body that nobody asked for.
func (a *api) call(ctx context.Context, method, path string, body, answer any) error {
	var content io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(data)
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, content)
	if err != nil {
		return err
	}
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := a.client.Do(request)
	if err != nil {
		return fmt.Errorf("firecracker: %w", err)
	}
	defer response.Body.Close()
	data, err := io.ReadAll(io.LimitReader(response.Body, mostAnswer))
	if err != nil {
		return fmt.Errorf("firecracker: %s %s: %w", method, path, err)
	}
	want := http.StatusNoContent
	if answer != nil {
		want = http.StatusOK
	}
	if response.StatusCode != want {
		return &apiError{method, path, response.Status, fault(data)}
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(data, answer); err != nil {
		return fmt.Errorf("firecracker: %s %s: %w", method, path, err)
	}
	return nil
}

// fault is the reason in an answer's body, or the body where it holds none.
func fault(body []byte) string {
	var said struct {
		Fault string `json:"fault_message"`
	}
	if json.Unmarshal(body, &said) != nil || said.Fault == "" {
		said.Fault = string(body)
	}
	return line(said.Fault)
}

// line makes one short line of what Firecracker said.
func line(text string) string {
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return ' '
		}
		return r
	}, text)
	if len(text) > 500 {
		text = strings.ToValidUTF8(text[:500], "")
	}
	return text
}

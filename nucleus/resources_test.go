package nucleus

import (
	"encoding/json"
	"strings"
	"testing"
)

// A limit of nothing is not the default: who states it is told.
func TestResourcesOfNothing(t *testing.T) {
	for _, text := range []string{`{"cpu":0}`, `{"memory_mb":0}`, `{"pids":0,"cpu":1}`, `{"disk_mb":0}`} {
		var spec PodSpec
		err := json.Unmarshal([]byte(`{"resources":`+text+`}`), &spec)
		if err == nil || AsError(err).Kind != KindInvalid || !strings.Contains(err.Error(), " is 0, want ") || !strings.Contains(err.Error(), "hint: ") {
			t.Errorf("%s: %+v, %v", text, spec.Resources, err)
		}
	}
	for _, text := range []string{`{"cpus":1}`, `{"cpu":1,"x":2}`, `[1]`, `{"cpu":1.5}`} {
		var r Resources
		if err := json.Unmarshal([]byte(text), &r); err == nil {
			t.Errorf("%s: %+v", text, r)
		}
	}
	for _, want := range []Resources{{}, {CPU: 1}, {CPU: 32, MemoryMB: 256, Pids: 64, DiskMB: 64}} {
		raw, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		got := Resources{CPU: 7}
		if want.CPU == 0 {
			got = Resources{}
		}
		if err := json.Unmarshal(raw, &got); err != nil || got != want {
			t.Errorf("%s: %+v, %v", raw, got, err)
		}
	}
}

func TestResourcesCheck(t *testing.T) {
	for _, r := range []Resources{{CPU: 10000}, {CPU: -1}, {CPU: 33}, {MemoryMB: 255}, {MemoryMB: 1 << 40}, {Pids: 63}, {DiskMB: 1}, {DiskMB: 512001}} {
		if err := r.Check(); err == nil || AsError(err).Kind != KindInvalid || !strings.Contains(err.Error(), "hint: ") {
			t.Errorf("%+v: %v", r, err)
		}
	}
	for _, r := range []Resources{{}, {CPU: 1}, {CPU: 32, MemoryMB: 65536, Pids: 1 << 20, DiskMB: 512000}, {MemoryMB: 256, Pids: 64, DiskMB: 64}} {
		if err := r.Check(); err != nil {
			t.Errorf("%+v: %v", r, err)
		}
	}
}

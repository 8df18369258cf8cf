package machinetest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cal/machine"
	"cal/machine/machinetest/script"
	"cal/nucleus"
)

func testRefused(t *testing.T, host Host) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	layer := func(hostPath, guest string) func(*machine.Spec) {
		return func(s *machine.Spec) { s.Image.Layers = []nucleus.Layer{{Name: "l", Host: hostPath, Guest: guest}} }
	}
	agent := func(hostPath, guest string) func(*machine.Spec) {
		return func(s *machine.Spec) { s.Agent = []nucleus.Layer{{Name: "a", Host: hostPath, Guest: guest}} }
	}
	tmp := t.TempDir()
	for name, spoil := range map[string]func(*machine.Spec){
		"no id":                    func(s *machine.Spec) { s.ID = "" },
		"id with a slash":          func(s *machine.Spec) { s.ID = "a/../../b" },
		"id that is a flag":        func(s *machine.Spec) { s.ID = "--root=/" },
		"id with a newline":        func(s *machine.Spec) { s.ID = "a\nb" },
		"id with upper case":       func(s *machine.Spec) { s.ID = "Pod" },
		"long id":                  func(s *machine.Spec) { s.ID = strings.Repeat("a", 64) },
		"relative directory":       func(s *machine.Spec) { s.Dir = "d" },
		"directory with dots":      func(s *machine.Spec) { s.Dir += "/../d" },
		"missing directory":        func(s *machine.Spec) { s.Dir += "/none" },
		"open directory":           func(s *machine.Spec) { must(t, os.Chmod(s.Dir, 0o755)) },
		"link for a directory":     func(s *machine.Spec) { link := s.Dir + "-link"; must(t, os.Symlink(s.Dir, link)); s.Dir = link },
		"missing workspace":        func(s *machine.Spec) { s.Workspace += "-none" },
		"file for a workspace":     func(s *machine.Spec) { s.Workspace = file },
		"link for a workspace":     func(s *machine.Spec) { link := s.Dir + "-ws"; must(t, os.Symlink("/etc", link)); s.Workspace = link },
		"workspace in directory":   func(s *machine.Spec) { s.Workspace = s.Dir + "/ws"; must(t, os.Mkdir(s.Workspace, 0o700)) },
		"workspace is everything":  func(s *machine.Spec) { s.Workspace = "/" },
		"missing proxy":            func(s *machine.Spec) { s.Proxy += "-none" },
		"proxy that cannot run":    func(s *machine.Spec) { s.Proxy = file },
		"unknown image":            func(s *machine.Spec) { s.Image.Kind = "oci" },
		"no image":                 func(s *machine.Spec) { s.Image.Kind = "" },
		"layer of everything":      layer("/", "/opt/x"),
		"layer over the root":      layer(tmp, "/"),
		"layer over the proxy":     layer(tmp, "/.nucleus"),
		"layer in the workspace":   layer(tmp, nucleus.MachineWorkspace+"/x"),
		"layer above workspace":    layer(tmp, "/home"),
		"layer over /proc":         layer(tmp, "/proc/x"),
		"layer over resolv.conf":   layer(tmp, "/etc/resolv.conf"),
		"layer with dots":          layer(tmp, "/opt/../etc"),
		"missing layer":            layer(tmp+"/none", "/opt/x"),
		"device for a layer":       layer("/dev/null", "/opt/x"),
		"agent layer outside":      agent(tmp, "/opt/x"),
		"agent layer over all":     agent(tmp, nucleus.MachineAgent),
		"agent layer by a dot-dot": agent(tmp, nucleus.MachineAgent+"/../x"),
		"layers over one another": func(s *machine.Spec) {
			s.Image.Layers = []nucleus.Layer{{Name: "1", Host: tmp, Guest: "/opt/a"}, {Name: "2", Host: tmp, Guest: "/opt/a-b"}, {Name: "3", Host: tmp, Guest: "/opt/a/b"}}
		},
		"layer of the machine":  func(s *machine.Spec) { layer(filepath.Dir(s.Dir), "/opt/x")(s) },
		"too many processors":   func(s *machine.Spec) { s.Resources.CPU = 33 },
		"negative processors":   func(s *machine.Spec) { s.Resources.CPU = -1 },
		"too little memory":     func(s *machine.Spec) { s.Resources.MemoryMB = 1 },
		"too few processes":     func(s *machine.Spec) { s.Resources.Pids = 1 },
		"too little disk":       func(s *machine.Spec) { s.Resources.DiskMB = 63 },
		"too much disk":         func(s *machine.Spec) { s.Resources.DiskMB = 512001 },
		"disk watched":          func(s *machine.Spec) { s.Watched = []string{"disk"} },
		"unknown thing watched": func(s *machine.Spec) { s.Watched = []string{"luck"} },
	} {
		t.Run(name, func(t *testing.T) {
			spec := host.Spec(t)
			spoil(&spec)
			m, err := host.Driver().Create(Context(t), spec)
			if err == nil {
				m.Destroy(Context(t))
			}
			if !errors.Is(err, machine.ErrRefused) {
				t.Fatalf("got %v, want a refusal", err)
			}
			if strings.HasPrefix(spec.Dir, "/") && !strings.Contains(name, "directory") {
				if entries, err := os.ReadDir(spec.Dir); err != nil || len(entries) != 0 {
					t.Errorf("left in the directory: %v, %v", entries, err)
				}
			}
			host.nothingLeft(t, spec.Dir)
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func testLimits(t *testing.T, host Host) {
	spec := host.Spec(t)
	spec.Resources = nucleus.Resources{CPU: 1, MemoryMB: 512, Pids: 128, DiskMB: 100}
	stated := []string{"cpu", "memory", "pids", "disk"}
	m, err := host.Driver().Create(Context(t), spec)
	for range 2 { // what can only be watched, and what is not limited, is refused by name
		if !errors.Is(err, machine.ErrRefused) {
			break
		}
		switch {
		case strings.Contains(err.Error(), "memory") && strings.Contains(err.Error(), "watched"):
			spec.Watched = []string{"memory"}
		case strings.Contains(err.Error(), "disk is not limited here"):
			spec.Resources.DiskMB, stated = 0, stated[:3]
		default:
			t.Errorf("refusal does not say what can only be watched: %v", err)
		}
		m, err = host.Driver().Create(Context(t), spec)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.destroy(t, m, spec.Dir) })
	how := map[string]string{}
	for _, limit := range m.Limits() {
		how[limit.Resource] = limit.How
	}
	t.Logf("limits: %v", m.Limits())
	for _, resource := range stated {
		if how[resource] != machine.Enforced && (how[resource] != machine.Watched || len(spec.Watched) == 0) {
			t.Errorf("%s: %q", resource, how[resource])
		}
	}
	Talk(t, m.Wire()).Must(script.Action{Do: "echo", UID: -1})
}

package image

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cal/nucleus"
)

// fakeHost is a small host with a merged /usr and secrets where hosts have them.
func fakeHost(t *testing.T) string {
	dir := homeDir(t)
	plant(t, dir, map[string]string{
		"usr/bin/sh": "#!", "usr/lib/x": "", "bin": "-> usr/bin", "lib": "-> usr/lib", "lib64": "-> usr/lib64", "sbin/init": "#!",
		"etc/passwd": "root:x:0:0::/:/bin/sh\nperson:x:1000:1000:A Person:/home/person:/bin/zsh\n", "etc/shadow": "secret", "etc/ssl/certs/ca.pem": "cert",
		"etc/ssl/private/key": "secret", "etc/ld.so.cache": "cache", "etc/localtime": "-> /usr/share/zoneinfo/UTC", "etc/alternatives/awk": "-> /usr/bin/mawk",
		"etc/hosts": "10.0.0.1 secret\n", "etc/resolv.conf": "nameserver 10.0.0.53\n", "etc/sudoers": "secret", "etc/java-17-openjdk/security": "s", "etc/services": "ssh 22/tcp\n",
		"home/person/.ssh/id": "secret", "root/.bashrc": "secret", "var/lib/x": "secret", "run/x": "secret", "opt/x": "secret",
	})
	must(t, os.Chmod(dir+"/etc/services", 0o600))
	return dir
}

func TestHostRoot(t *testing.T) {
	host := fakeHost(t)
	root, err := Resolve(nucleus.Image{Kind: "host"}, host)
	must(t, err)
	var binds []string
	for _, bind := range root.Binds {
		if bind.Host != filepath.Join(host, bind.Guest) {
			t.Errorf("%s is shown at %s", bind.Host, bind.Guest)
		}
		binds = append(binds, bind.Guest)
	}
	if want := []string{"/etc/alternatives", "/etc/java-17-openjdk", "/etc/ssl/certs", "/sbin", "/usr"}; !slices.Equal(binds, want) {
		t.Errorf("binds %v, want %v", binds, want)
	}
	dir := t.TempDir()
	must(t, root.Build(dir, "/proc", "/home/agent/workspace"))
	for name, target := range map[string]string{"bin": "usr/bin", "lib64": "usr/lib64", "etc/localtime": "/usr/share/zoneinfo/UTC"} {
		if got, err := os.Readlink(filepath.Join(dir, name)); err != nil || got != target {
			t.Errorf("%s -> %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"etc/shadow", "etc/sudoers", "etc/ssl/private", "etc/services", "home/person", "root", "var", "run", "opt"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s is in the root: %v", name, err)
		}
	}
	for name, data := range root.Files {
		if strings.Contains(string(data), "secret") || strings.Contains(string(data), "person") || strings.Contains(string(data), "10.0.0.") {
			t.Errorf("%s: %q", name, data)
		}
	}
	for name, want := range map[string]string{"etc/resolv.conf": "nameserver 127.0.0.1\n", "etc/ld.so.cache": "cache", "etc/passwd": "agent:x:1000:1000:"} {
		if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !strings.Contains(string(data), want) {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
}

func TestResolveRefuses(t *testing.T) {
	dir := homeDir(t)
	plant(t, dir, map[string]string{"usr/bin/x": "", "empty/": "", "file": "", "flat/usr": ""})
	for name, image := range map[string]nucleus.Image{
		"unknown kind":           {Kind: "tarball"},
		"no kind":                {},
		"relative directory":     {Kind: "directory", Path: "rootfs"},
		"missing directory":      {Kind: "directory", Path: dir + "/none"},
		"whole host":             {Kind: "directory", Path: "/"},
		"file for a directory":   {Kind: "directory", Path: dir + "/file"},
		"directory without root": {Kind: "directory", Path: dir + "/empty"},
		"a file as /usr":         {Kind: "directory", Path: dir + "/flat"},
		"missing layer":          {Kind: "directory", Path: dir, Layers: []nucleus.Layer{{Name: "l", Host: dir + "/none", Guest: "/opt/x"}}},
		"layer that would need a place inside another": {Kind: "directory", Path: dir, Layers: []nucleus.Layer{{Name: "l", Host: dir + "/empty", Guest: "/usr/new"}}},
	} {
		if root, err := Resolve(image, "/"); err == nil {
			t.Errorf("%s: %+v", name, root)
		}
	}
	if _, err := Resolve(nucleus.Image{Kind: "host"}, dir+"/empty"); err == nil {
		t.Error("a host without /usr was taken")
	}
	if _, err := os.Lstat(dir + "/usr/new"); !os.IsNotExist(err) {
		t.Errorf("a place was made in the image: %v", err)
	}
	if _, err := Resolve(nucleus.Image{Kind: "directory", Path: dir, Layers: []nucleus.Layer{{Name: "l", Host: dir + "/empty", Guest: "/usr/bin"}}}, "/"); err != nil {
		t.Errorf("control: %v", err)
	}
}

func TestDirectoryRoot(t *testing.T) {
	dir := homeDir(t)
	plant(t, dir, map[string]string{
		"usr/bin/sh": "#!", "bin": "-> usr/bin", "etc/passwd": "root:x:0:0::/root:/bin/bash\npostgres:x:70:70::/var/lib:/bin/sh\nclash:x:1000:1000::/:/bin/sh\n",
		"etc/resolv.conf": "-> ../run/resolv.conf", "etc/app/conf": "c", "etc/secret/key": "s", "var/x": "", "proc/": "", "dev/null": "not a device", "home/agent/x": "", "home/u/x": "",
		"private/x": "", ".dockerenv": "",
	})
	must(t, os.Chmod(dir+"/etc/secret", 0o700))
	must(t, os.Chmod(dir+"/private", 0o700))
	root, err := Resolve(nucleus.Image{Kind: "directory", Path: dir}, "/")
	must(t, err)
	var binds []string
	for _, bind := range root.Binds {
		binds = append(binds, bind.Guest)
	}
	if want := []string{"/.dockerenv", "/home/u", "/usr", "/var"}; !slices.Equal(binds, want) {
		t.Errorf("binds %v, want %v", binds, want)
	}
	passwd := string(root.Files["/etc/passwd"])
	if !strings.Contains(passwd, "postgres:x:70") || strings.Contains(passwd, "clash") || strings.Count(passwd, ":0:0:") != 1 {
		t.Errorf("passwd: %s", passwd)
	}
	if root.Files["/etc/secret/key"] != nil || string(root.Files["/etc/app/conf"]) != "c" || root.Links["/etc/resolv.conf"] != "" {
		t.Errorf("etc: %v %v", root.Files, root.Links)
	}
	must(t, root.Build(t.TempDir()))
}

func TestUnreadable(t *testing.T) {
	dir := homeDir(t)
	plant(t, dir, map[string]string{"a/public": "", "a/group": "", "a/none": "", "b/inside": "", "c/listed": "", "link": "-> /etc/shadow", "dangling": "-> nowhere"})
	for name, mode := range map[string]os.FileMode{"a/group": 0o640, "a/none": 0, "b": 0o750, "c": 0o754} {
		must(t, os.Chmod(filepath.Join(dir, name), mode))
	}
	var screen Screen
	now := time.Unix(1000, 0)
	look := func(at time.Time) []string {
		t.Helper()
		found, err := screen.Unreadable(context.Background(), dir, at)
		must(t, err)
		slices.Sort(found)
		return found
	}
	want := []string{dir + "/a/group", dir + "/a/none", dir + "/b", dir + "/c"}
	if got := look(now); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	must(t, os.Chmod(dir+"/a/public", 0o600))
	if got := look(now.Add(time.Minute)); !slices.Equal(got, want) {
		t.Errorf("after a minute it was read again: %v", got)
	}
	if got := look(now.Add(time.Hour)); len(got) != len(want)+1 {
		t.Errorf("after an hour: %v", got)
	}
	if got, err := screen.Unreadable(context.Background(), dir+"/a/group", now); err != nil || len(got) != 1 {
		t.Errorf("a private file itself: %v, %v", got, err)
	}
	if _, err := screen.Unreadable(context.Background(), dir+"/missing", now); err == nil {
		t.Error("a missing directory was screened")
	}
	many := filepath.Join(dir, "many")
	must(t, os.Mkdir(many, 0o755))
	for i := range mostUncovered + 1 {
		must(t, os.WriteFile(filepath.Join(many, strings.Repeat("x", i%200+1)+string(rune('a'+i/200))), nil, 0o600))
	}
	if _, err := screen.Unreadable(context.Background(), many, now); err == nil {
		t.Error("more than can be covered was accepted")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	other := homeDir(t)
	if _, err := screen.Unreadable(ctx, other, now); err == nil {
		t.Error("an ended context was ignored")
	}
	if _, err := screen.Unreadable(context.Background(), other, now); err != nil {
		t.Errorf("after another caller gave up: %v", err)
	}
}

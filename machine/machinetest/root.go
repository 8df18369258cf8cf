package machinetest

import (
	"os"
	"path/filepath"
	"testing"

	"cal/internal/confine"
	"cal/nucleus"
)

// SmallImage makes a root file system with a shell and little else in dir, for drivers
// whose machines hold a copy of their root: that of the host's programs takes minutes.
func SmallImage(t testing.TB, dir string) nucleus.Image {
	t.Helper()
	root := filepath.Join(dir, "root")
	for _, name := range []string{"usr/bin", "usr/lib", "usr/lib64", "usr/sbin", "etc/ssl/certs"} {
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{
		"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64",
		// Where the machine has its own, an image's links lead nowhere.
		"home": "/var/home", "root": "/nonexistent", "tmp": "/usr", "run": "../etc",
	} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"sh", "head", "cat", "true", "sleep", "uname"} {
		files, err := confine.Libraries(t.Context(), "/bin/"+name)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if err := copyTo(filepath.Join(root, file.Guest), file.Host); err != nil {
				t.Fatal(err)
			}
		}
	}
	return nucleus.Image{Kind: nucleus.ImageDirectory, Path: root}
}

func copyTo(target, source string) error {
	if _, err := os.Stat(target); err == nil {
		return nil // a library of several programs
	}
	data, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	return os.WriteFile(target, data, 0o755)
}

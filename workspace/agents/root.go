package agents

import (
	"debug/elf"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"cal/nucleus"
)

// root lists what of the host lies in the agent's own root. Every layer is one
// file, but for the terminal descriptions.
func (d Definition) root(in Install, programs map[string]string) ([]nucleus.Layer, error) {
	layers := d.programLayers(in, programs)
	libraries := map[string]string{}
	for _, file := range programs {
		if err := needs(file, libraries); err != nil {
			return nil, err
		}
	}
	for guest, host := range libraries {
		layers = append(layers, nucleus.Layer{Name: "library " + filepath.Base(guest), Host: host, Guest: guest})
	}
	if host := first(certificates); host != "" {
		layers = append(layers, nucleus.Layer{Name: "certificates", Host: host, Guest: certificates[0]})
	}
	if host := first(terminals); host != "" {
		layers = append(layers, nucleus.Layer{Name: "terminal descriptions", Host: host, Guest: "/usr/share/terminfo"})
	}
	slices.SortFunc(layers, func(a, b nucleus.Layer) int { return strings.Compare(a.Guest, b.Guest) })
	return layers, nil
}

// programLayers shows the agent's own programs and nothing beside them.
func (d Definition) programLayers(in Install, programs map[string]string) []nucleus.Layer {
	var layers []nucleus.Layer
	for name, file := range programs {
		layers = append(layers, nucleus.Layer{Name: d.Title + " " + in.Version, Host: file, Guest: d.guestPath(name)})
	}
	slices.SortFunc(layers, func(a, b nucleus.Layer) int { return strings.Compare(a.Guest, b.Guest) })
	return layers
}

// guestPath is where a program of the install lies in the machine.
func (d Definition) guestPath(name string) string { return "/opt/" + d.Name + "/bin/" + name }

// The first that exists is taken. Certificates appear at the first name, which
// is one of those that every TLS library tries.
var (
	certificates = []string{
		"/etc/ssl/certs/ca-certificates.crt",                // Debian, Arch, Alpine
		"/etc/pki/tls/certs/ca-bundle.crt",                  // Fedora
		"/etc/ssl/ca-bundle.pem",                            // openSUSE
		"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", // RHEL
	}
	// Debian keeps the common terminals in /lib, the rest in /usr/share.
	terminals = []string{"/lib/terminfo", "/usr/share/terminfo"}
)

// first is the first path that exists, without symbolic links, or "".
func first(paths []string) string {
	for _, path := range paths {
		if real, err := filepath.EvalSymlinks(path); err == nil {
			return real
		}
	}
	return ""
}

// triplets name Debian's library directories.
var triplets = map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}

// lookups are what glibc before 2.34 loads by name to resolve users and hosts.
var lookups = []string{"libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2"}

// needs adds to found the loader and the libraries that a program needs, all the
// way down: path in the root -> file of the host without symbolic links. A static
// program adds none. Directories are those that the loader has built in, since
// the agent's root has no loader cache, and those that the program itself names.
func needs(program string, found map[string]string) error {
	f, err := elf.Open(program)
	if err != nil {
		return fmt.Errorf("reading what %s needs: %w", program, err)
	}
	defer f.Close()
	loader, err := interpreter(f)
	if err != nil {
		return fmt.Errorf("reading the loader of %s: %w", program, err)
	}
	if loader == "" {
		return nil
	}
	if found[loader], err = filepath.EvalSymlinks(loader); err != nil {
		return fmt.Errorf("loader of %s: %w", program, err)
	}
	triplet := triplets[runtime.GOARCH]
	dirs := []string{"/lib/" + triplet, "/usr/lib/" + triplet, "/lib64", "/usr/lib64", "/lib", "/usr/lib", filepath.Dir(loader)}
	if err := libraries(f, program, loader, dirs, found); err != nil {
		return err
	}
	for _, name := range lookups {
		if path, file := findLibrary(name, dirs, f.Machine); path != "" {
			found[path] = file
		}
	}
	return nil
}

// interpreter is the loader that a program names, or "" for a static one.
func interpreter(f *elf.File) (string, error) {
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		if p.Filesz > 4096 {
			return "", fmt.Errorf("its name has %d bytes", p.Filesz)
		}
		raw := make([]byte, p.Filesz)
		if _, err := p.ReadAt(raw, 0); err != nil {
			return "", err
		}
		name := strings.TrimRight(string(raw), "\x00")
		if !filepath.IsAbs(name) {
			return "", fmt.Errorf("its name is %q", name)
		}
		return name, nil
	}
	return "", nil
}

func libraries(f *elf.File, file, loader string, dirs []string, found map[string]string) error {
	names, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("reading what %s needs: %w", file, err)
	}
	var own []string
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		values, err := f.DynString(tag)
		if err != nil {
			return fmt.Errorf("reading what %s needs: %w", file, err)
		}
		for _, value := range values {
			for _, dir := range strings.Split(value, ":") {
				if dir = strings.NewReplacer("$ORIGIN", filepath.Dir(file), "${ORIGIN}", filepath.Dir(file)).Replace(dir); filepath.IsAbs(dir) {
					own = append(own, dir)
				}
			}
		}
	}
	for _, name := range names {
		if name == filepath.Base(loader) {
			continue
		}
		path, real := findLibrary(name, append(own, dirs...), f.Machine)
		if path == "" {
			return fmt.Errorf("%s needs %s, which is in none of %s", file, name, strings.Join(append(own, dirs...), ", "))
		}
		if _, ok := found[path]; ok {
			continue
		}
		found[path] = real
		if err := librariesOf(real, loader, dirs, found); err != nil {
			return err
		}
	}
	return nil
}

func librariesOf(file, loader string, dirs []string, found map[string]string) error {
	f, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("reading what %s needs: %w", file, err)
	}
	defer f.Close()
	return libraries(f, file, loader, dirs, found)
}

// findLibrary is where a library lies, and its file without symbolic links.
func findLibrary(name string, dirs []string, machine elf.Machine) (path, real string) {
	for _, dir := range dirs {
		path := filepath.Join(dir, name)
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			continue
		}
		f, err := elf.Open(real)
		if err != nil {
			continue // a linker script, or not ours to read
		}
		fits := f.Machine == machine
		_ = f.Close()
		if fits {
			return path, real
		}
	}
	return "", ""
}

package nucleus

import (
	"regexp"
	"strings"
)

// Image is the root file system, by its kind. No kind is the driver's usual one.
type Image struct {
	Kind     string   `json:"kind,omitempty"`
	Path     string   `json:"path,omitempty"`     // of ImageDirectory and ImageTarball, on the host
	Ref      string   `json:"ref,omitempty"`      // of ImageOCI
	Suite    string   `json:"suite,omitempty"`    // of ImageDebian; empty: the host's sources
	Packages []string `json:"packages,omitempty"` // of ImageDebian, beside the usual ones
	Layers   []Layer  `json:"layers,omitempty"`   // toolchains and caches, read-only

	// Env is what makes tools find and use the layers.
	Env map[string]string `json:"env,omitempty"`
}

// The kinds of images.
const (
	ImageHost      = "host"      // a read-only view of the host's programs
	ImageDirectory = "directory" // that holds a root file system
	ImageTarball   = "tarball"   // of a root file system, compressed or not
	ImageOCI       = "oci"       // of a registry, by digest or by tag
	ImageDebian    = "debian"    // made from packages
)

// Layer is a directory of the host shown read-only at Guest.
type Layer struct {
	Name  string `json:"name"` // "go", "go modules", "npm cache", ...
	Host  string `json:"host"`
	Guest string `json:"guest"`
}

// Toolchains is where in a machine the person's toolchains lie.
const Toolchains = "/opt/toolchains"

// mostPackages bounds a list that a person writes.
const mostPackages = 200

var (
	debianSuite   = regexp.MustCompile(`^[a-z][a-z0-9-]{0,39}$`)
	debianPackage = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]{1,99}(=[A-Za-z0-9.+:~-]{1,99})?$`)
	ociRef        = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9./:@_-]{0,399}$`)
)

// Check says what is wrong with an image's shape: a kind that is not known, a field that
// is missing, is no name of its kind, or belongs to another kind. Layers are the machine's
// to check.
func (i Image) Check() error {
	given := map[string]bool{"path": i.Path != "", "ref": i.Ref != "", "suite": i.Suite != "", "packages": len(i.Packages) > 0}
	takes := map[string][]string{"": nil, ImageHost: nil, ImageDirectory: {"path"}, ImageTarball: {"path"}, ImageOCI: {"ref"}, ImageDebian: {"suite", "packages"}}
	fields, known := takes[i.Kind]
	if !known {
		return Errorf(KindInvalid, "image kind %q: want host, debian, oci, tarball or directory", i.Kind)
	}
	for _, field := range fields {
		delete(given, field)
	}
	for field, is := range given {
		if is {
			return Errorf(KindInvalid, "an image of kind %q takes no %s", i.Kind, field)
		}
	}
	switch {
	case i.Kind == ImageDirectory || i.Kind == ImageTarball:
		if !strings.HasPrefix(i.Path, "/") || strings.ContainsAny(i.Path, "\x00\n") {
			return Errorf(KindInvalid, "image path %q is not absolute", i.Path)
		}
	case i.Kind == ImageOCI && !ociRef.MatchString(i.Ref):
		return Errorf(KindInvalid, "image reference %q: want [REGISTRY/]NAME[:TAG][@sha256:...]", i.Ref)
	case i.Suite != "" && !debianSuite.MatchString(i.Suite):
		return Errorf(KindInvalid, "suite %q of Debian: want a name as bookworm", i.Suite)
	case len(i.Packages) > mostPackages:
		return Errorf(KindInvalid, "%d packages, want at most %d", len(i.Packages), mostPackages)
	}
	for _, name := range i.Packages {
		if !debianPackage.MatchString(name) {
			return Errorf(KindInvalid, "package %q: want NAME or NAME=VERSION", name)
		}
	}
	return nil
}

// String is the image as a person writes it, without its layers.
func (i Image) String() string {
	switch i.Kind {
	case ImageDirectory, ImageTarball:
		return i.Kind + ":" + i.Path
	case ImageOCI:
		return i.Kind + ":" + i.Ref
	case ImageDebian:
		text := i.Kind
		if i.Suite != "" {
			text += "@" + i.Suite
		}
		if len(i.Packages) > 0 {
			text += ":" + strings.Join(i.Packages, ",")
		}
		return text
	}
	return i.Kind
}

// ParseImage reads what String writes: host, debian[@SUITE][:PACKAGE,...], oci:REF,
// tarball:PATH or directory:PATH. It is checked; "" is the driver's usual image.
func ParseImage(text string) (Image, error) {
	kind, rest, more := strings.Cut(text, ":")
	kind, suite, hasSuite := strings.Cut(kind, "@")
	i := Image{Kind: kind, Suite: suite}
	switch {
	case kind == ImageDirectory || kind == ImageTarball:
		i.Path = rest
	case kind == ImageOCI:
		i.Ref = rest
	case kind == ImageDebian && more:
		i.Packages = strings.Split(rest, ",")
	case more || hasSuite && suite == "":
		return Image{}, Errorf(KindInvalid, "image %q: want host, debian[@SUITE][:PACKAGE,...], oci:REF, tarball:PATH or directory:PATH", text)
	}
	return i, i.Check()
}

// Environments names where the machine's programs come from: the root, then toolchains.
func (i Image) Environments() []string {
	names := []string{i.Kind}
	if i.Kind == ImageOCI || i.Kind == ImageDebian {
		names[0] = i.String()
	}
	for _, l := range i.Layers {
		if strings.HasPrefix(l.Guest, Toolchains+"/") {
			names = append(names, l.Name)
		}
	}
	return names
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"cal/approval"
	"cal/approval/client"
	"cal/authority"
)

func (c *command) approver() *cobra.Command {
	cmd := &cobra.Command{Use: "approver", Short: "Who can approve: add, list and remove", Example: "  nucleus-authority approver list", Args: args(cobra.NoArgs)}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	cmd.AddCommand(c.addApprover(), c.listApprovers(), c.removeApprover())
	return cmd
}

func (c *command) addApprover() *cobra.Command {
	var by string
	var passkey bool
	var port int
	cmd := &cobra.Command{
		Use: "add NAME", Short: "Make the key of one more approver, on the word of one who is there", Args: args(cobra.ExactArgs(1)),
		Long: "Make the key of one more approver, sealed with a passphrase of its own. One who can approve now types the own passphrase\nfirst. " +
			"The new key can grant for machines that start from now on; a machine knows only those who were there when it started.\n\n" +
			"With --passkey the key is made and kept by an authenticator (WebAuthn) that verifies its owner each time: a browser of this host\n" +
			"makes it on the authority's own page, and approves there. Compare the fingerprint that page and terminal show before the\n" +
			"passphrase is typed.",
		Example: "  nucleus-authority approver add bob\n  nucleus-authority approver add carol --by ann\n  nucleus-authority approver add ann-touch --passkey",
	}
	cmd.Flags().BoolVar(&passkey, "passkey", false, "with a passkey, made in a browser")
	cmd.Flags().IntVar(&port, "port", 0, fmt.Sprintf("of the page on localhost (default: that of the passkeys there are, or %d)", client.DefaultPort))
	cmd.Flags().StringVar(&by, "by", "", "who vouches (default: the only approver there is)")
	cmd.RunE = func(cmd *cobra.Command, names []string) error {
		ctx := cmd.Context()
		if port != 0 && !passkey {
			return usageError{errors.New("--port is of the page of a passkey: add --passkey")}
		}
		if err := authority.CheckSocketDir(c.socket); err != nil {
			return err
		}
		voucher, err := authority.ReadKey(c.dir, by)
		if err != nil {
			return err
		}
		api := client.New(c.socket)
		defer api.Close()
		if _, err := api.Info(ctx); err != nil { // before anybody types
			return err
		}
		return atTerminal(ctx, func(p *authority.Prompt) error {
			if passkey {
				_, err := p.AddPasskey(ctx, api, voucher, client.NewPasskey{Name: names[0], Port: port})
				return err
			}
			_, err := p.AddApprover(ctx, api, voucher, names[0])
			return err
		})
	}
	return cmd
}

func (c *command) listApprovers() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "list", Short: "List the approvers and their public keys, those who were removed too", Args: args(cobra.NoArgs),
		Example: "  nucleus-authority approver list --json",
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		list, err := authority.ReadApprovers(c.dir)
		if errors.Is(err, authority.ErrNoKey) {
			if list, err = c.theirs(cmd.Context(), err); err == nil {
				fmt.Fprintln(os.Stderr, "there is no key in "+c.dir+": this is what the authority that answers says, of who can approve now")
			}
		}
		if err != nil {
			return err
		}
		if asJSON {
			enc := json.NewEncoder(os.Stdout)
			enc.SetIndent("", "  ")
			return enc.Encode(list)
		}
		for _, a := range list {
			line := fmt.Sprintf("%s  %s  %x", a.Name, a.Kind, a.Key)
			if a.Origin != "" {
				line += "  " + a.Origin
			}
			if a.AddedBy != "" {
				line += "  added by " + a.AddedBy
			}
			if a.Removed != 0 {
				line += "  removed " + time.UnixMilli(a.Removed).Format("2006-01-02 15:04:05")
			}
			fmt.Println(approval.Visible(line))
		}
		return nil
	}
	return cmd
}

// theirs are those who can approve with the authority of another user, if one answers; none is the
// error of there being no key here.
func (c *command) theirs(ctx context.Context, none error) (list []authority.Listed, err error) {
	api := client.New(c.socket)
	defer api.Close()
	info, err := api.Info(ctx)
	if client.Absent(err) {
		return nil, none
	} else if err != nil {
		return nil, err
	}
	for _, a := range info.Approvers {
		list = append(list, authority.Listed{Approver: a})
	}
	return list, nil
}

func (c *command) removeApprover() *cobra.Command {
	cmd := &cobra.Command{
		Use: "remove NAME", Short: "Take an approver's key away for good; what it granted and was not used is void", Args: args(cobra.ExactArgs(1)),
		Example: "  nucleus-authority approver remove bob",
	}
	cmd.RunE = func(cmd *cobra.Command, names []string) error {
		api := client.New(c.socket)
		defer api.Close()
		gone, err := api.RemoveApprover(cmd.Context(), names[0])
		if err != nil {
			return err
		}
		fmt.Printf("approver %s is removed; %d grants of it were not used and are void\n", approval.Visible(gone.Name), len(gone.Revoked))
		if gone.Unrecorded {
			fmt.Fprintln(os.Stderr, unrecorded)
		}
		for _, ask := range gone.Revoked {
			fmt.Println("  ask", approval.Visible(ask))
		}
		return nil
	}
	return cmd
}

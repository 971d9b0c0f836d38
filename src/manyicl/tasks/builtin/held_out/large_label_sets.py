"""The held-out task with 30 labels and more: what is asked at the desk of a library."""

from dataclasses import replace

from manyicl.tasks.builtin.grammar import labelled, sentence_task

_DESK_WORDS = labelled("""
book: atlas | cookbook | detective novel | travel guide | biography | picture book | thriller | play by Chekhov
subject: astronomy | knitting | bridge building | birds of prey | Roman law | chess openings | volcanoes | opera
kin: daughter | grandson | lodger | flatmate | grandmother | wife
sum: two pounds | five pounds | ninety pence | eight pounds
floor: ground floor | first floor | top floor | basement
cause: on holiday | in hospital | moving house | abroad | snowed in
""")
_DESK = labelled("""
renew loan: May I keep the {book} for another fortnight? | I am {cause} and cannot return the {book} before its date.
renew loan: I have not finished the {book}; can it stay with me?
reserve title: Please hold the {book} for me once it is back. | Put my {kin} next in line for the {book}.
reserve title: The {book} is out; keep it back for my {kin} when it returns.
join library: How does my {kin} become a member? | I have just come to live here and want to sign up.
join library: I have no card yet. What papers do I need for one?
replace card: My {kin} lost the membership card. | The barcode on my card is worn off; I need another.
replace card: I sat on my card and it broke in two.
pay fine: I owe {sum} for the {book}; do you take coins? | Can I settle the late fee of {sum} here?
pay fine: Here is the money for my overdue {book}.
dispute fine: I brought the {book} on time, so why the {sum}? | Your {sum} penalty is a mistake, I was never late.
dispute fine: Nobody told us about a {sum} charge; please cancel it.
report damage: Tea got spilled over the {book}. | Some pages of the {book} are torn, I fear.
report damage: My {kin} drew on the cover of the {book}.
report loss: The {book} has vanished from my bag. | My {kin} left the {book} on a tram and it is gone.
report loss: I have searched everywhere, but the {book} is not to be found.
suggest purchase: You ought to buy something new on {subject}. | Would you order a {book} that you do not own?
suggest purchase: Your stock on {subject} is thin; could you acquire more?
locate shelf: Where do I look for {subject}? | On which shelf is the {book}?
locate shelf: I cannot see the {subject} section; is it on the {floor}?
ask advice: Can you recommend a good {book}? | What should my {kin} read about {subject}?
ask advice: I loved a {book}; what could I try next?
book study room: Is a group room on the {floor} free at two? | We are four and need a quiet room for {subject}.
book study room: Six of us would like to work behind a closed door on the {floor}.
use computer: May I sit down at a screen on the {floor}? | My {kin} wants to go online for an hour.
use computer: Is any desktop free to type a letter about {subject}?
print pages: How do I get ten sheets on {subject} out of the printer? | Your printer on the {floor} eats my paper.
print pages: I emailed you a file; can it come out on paper?
copy pages: May I photocopy a chapter of the {book}? | Is there a copier on the {floor}?
copy pages: I would like two pages of the {book} duplicated.
scan picture: I want a digital image of a page on {subject}. | Does the flatbed on the {floor} save to a memory stick?
scan picture: Turn this old photo of my {kin} into a file, please.
join wifi: What is the network key on the {floor}? | My laptop finds no wireless signal on the {floor}.
join wifi: Why can my phone not connect to the internet here?
borrow ebook: Can I have the {book} on my reader? | How do I download an electronic {book}?
borrow ebook: Does your app lend works on {subject} for tablets?
hear audiobook: Have you got the {book} on disc, read aloud? | My {kin} cannot see well; is the {book} spoken?
hear audiobook: I drive a lot; which recordings on {subject} can I listen to?
ask noise: Somebody on the {floor} is shouting. | Can you hush the people in the {subject} corner?
ask noise: A phone keeps ringing near {subject}, and I cannot concentrate.
find toilet: Where is the gents on the {floor}? | My {kin} urgently needs a washroom.
find toilet: Is there a place to change my {kin}'s nappy?
use lift: My {kin} uses a wheelchair; how do we reach the {floor}? | The stairs to the {floor} are too steep for me.
use lift: With this pram I need an elevator to the {floor}.
leave coat: Are there lockers on the {floor}? | Where may my {kin} hang up a wet jacket?
leave coat: I do not want to carry my rucksack about the {floor}.
find cafe: Is anything to eat sold on the {floor}? | I would like an espresso to go with my {book}.
find cafe: My {kin} is thirsty; where can we get a drink?
attend reading: Is the author of the {book} signing tonight? | Are seats left for the poet's talk on {subject}?
attend reading: At what time does the writer speak about {subject}?
join book club: Do people meet here to talk about a {book}? | Is there a circle of readers for {subject}?
join book club: I want to discuss a {book} with others every month.
bring children: Is there a story hour for my {kin}? | Which day do toddlers sing on the {floor}?
bring children: What do you offer for a five-year-old on rainy days?
give books: I have nine boxes on {subject} to donate. | Would you like to be given my late {kin}'s {book}?
give books: We cleared the attic; do you accept a used {book}?
volunteer help: My {kin} would gladly shelve for free. | Can I lend a hand on the {floor} without pay?
volunteer help: I am retired and would like to assist you unpaid.
return box: Is there a slot for the {book} after closing? | Where do I drop the {book} at midnight?
return box: Must I come inside to hand back the {book} on a Sunday?
order elsewhere: Could the {book} be sent here from a twin library? | Another town has a work on {subject}; get it for me?
order elsewhere: You do not have the {book}; can another branch post it?
change address: My {kin} and I have a new street and postcode. | Since moving house, your letters go to my old flat.
change address: Please write down where my {kin} lives now.
old newspapers: Have you the local paper of 1953 about {subject}? | May I see last century's dailies on the {floor}?
old newspapers: I need the front page from the day my {kin} was born.
trace family: I am looking for the parish records of my {kin}. | Who were my {kin}'s ancestors, and where do I look?
trace family: How can I find out when my {kin}'s forebears came here?
""")
_DESK_OPENINGS = labelled("""
opening: One question. | I wonder if I may ask. | Sorry to trouble you. | It is my first visit. | Quick thing. | Help, please.
""")

_TEMPLATES = {
    label: tuple(frame for request in requests for frame in (request, f"{{opening}} {request}", f"{request} {{opening}}"))
    for label, requests in _DESK.items()
}

GRAMMARS = (replace(sentence_task("library_desk", _TEMPLATES, _DESK_WORDS | _DESK_OPENINGS), num_train=340, num_test=102),)

"""What data.py reads out of a completion's reasoning, against what a careful reader does."""
import re
from types import SimpleNamespace

import pytest

from data import agreement_reward, concluded_option, process_reward

# ----------------------------------------------------------------------------------------------------------------------
# The tables. A case is a label, a colon and a text; a line that begins without a label goes on with the text before, and
# \n is a line break. A text without a tag stands inside <think></think>.


def read_table(text):
    """-> [(label, text of the case)]"""
    cases = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if label := re.match(r"(-|[A-E]|\d(?: \+\d)?): ", line):
            cases.append([label[1], line[label.end():]])
        else:
            cases[-1][1] += " " + line
    return [(label, case.replace(r"\n", "\n")) for label, case in cases]


def think(text, answer="A"):
    return text if "<" in text else f"<think>{text}</think><answer>{answer}</answer>"


# Options, and texts that conclude with A, B, .. or, -, with none.
CONCLUSIONS = [
    (("grab onion", "cut onion", "open drawer", "take knife"), r"""
    A: The person has opened the drawer and taken the knife. The goal is to cut an onion. The next logical step is to grab
        the onion so that it can be cut. Therefore, the correct answer is A.
    B: Let's analyze the options:\nA. grab onion - the onion is already on the board, so this is done.\nB. cut onion - the
        person holds the knife above the onion, so this is the most plausible.\nC. open drawer - there is no need for
        this.\nD. take knife - the knife is already in the hand.\nBased on this analysis, the next action is to cut the onion.
    -: The options are:\nA. grab onion\nB. cut onion\nC. open drawer\nD. take knife
    -: The question asks what the person does next. I have to choose between A. grab onion, B. cut onion, C. open drawer
        and D. take knife. The video shows a kitchen with a board.
    D: Among the options, "take knife" makes the most sense, since she needs one to cut the onion.
    D: The next action would be to take the knife (D). After that, they will cut the onion (B).
    B: So A... wait, the onion is already on the board, so it is B.
    A: I first thought of option D, but there is a knife in her left hand already. So the answer must be A.
    B: It can't be A because the onion is already there. It can't be C because the drawer is open. It can't be D because he
        holds the knife. So we are left with B.
    D: A person needs a knife to cut something. In the last frame no knife is visible. **D. take knife** is the best choice.
    C: The person is standing in front of the counter, and all drawers are closed. Opening the drawer would be the next
        step.
    B: Option A: The onion has been grabbed. \nOption B: This is the natural continuation. \nOption C: The drawer
        has already been opened. \nOption D: The knife was already taken. \nTherefore Option B is the right answer.
    A: The correct answer is A. C is not needed, since the drawer is already open, and D has been done before.
    -: Both A and D are plausible here, and the video does not tell which of them comes first.
    A: It is either A or D. As the knife is in the frame already, A is more likely.
    B: Not A but B.
    D: The answer is D, not C.
    B: The person in the video opens a drawer, takes a knife out of it, grabs an onion. Now the onion need to be cutted. So
        next action is cut onion.
    C: Looking at the image, a hand reaches for the handle of the drawer. This matches option C.
    A: 1. The person opened the drawer.\n2. The person took the knife.\n3. The person still needs something to cut.\n\nThe
        only option that fits is to grab an onion.
    """),
    (("put pot", "put pot on stove", "open tap", "take sponge"), r"""
    B: The pot is full of water. To boil it, the person has to put the pot on the stove.
    A: The pot is in the person's hand and the stove is covered. The most likely next action is "put pot".
    C: So A... wait, the pot is already full, so it is C.
    B: The person took the pot, filled it with water and closed the tap. The next step is to put the pot on the stove,
        which corresponds to option B.
    D: To clean a pot you need a sponge. A sponge lies beside the sink. I would choose to take the sponge.
    C: The pot is in the sink, empty. "put pot" is already done; "put pot on stove" makes no sense while it is empty; "take
        sponge" is for cleaning. So the remaining option is "open tap".
    B: Step 1: The person takes a pot.\nStep 2: The person opens the tap and fills the pot.\nStep 3: The person closes the
        tap.\nConclusion: put pot on stove.
    A: The best option is A rather than B, because the stove is not in view.
    -: The person is in a kitchen. There is a pot, a stove, a tap and a sponge. It is hard to say what happens next.
    C: Hence, the answer is (C) open tap.
    """),
    (("wash plate", "rinse sponge", "put plate in rack", "turn off tap"), r"""
    C: The plate is put in the rack next, as it is clean now.
    D: The plates are all in the rack and water is still running. He will likely turn off the tap. I am confident in this
        answer.
    A: The sponge has soap on it and the plate is dirty. Option A seems the most plausible. Option D would be premature,
        because the water is still needed.
    C: **Analysis of the options:**\n\n- **A (wash plate)**: already done.\n- **B (rinse sponge)**: possible, but not
        yet.\n- **C (put plate in rack)**: the plate is clean and the rack is at hand.\n- **D (turn off tap)**: the tap
        is off.\n\n**Conclusion:** C
    D: If the tap were off, the answer would be C. But the tap is on, thus D.
    B: The man has washed the plate with the sponge and has put the plate in the rack. Given that the sponge is full of foam,
        rinsing it is what follows. Final answer: B
    A: Since the plate is dirty, the person isn't going to put it in the rack or turn off the tap. She will wash the plate.
    C: A is incorrect. B is incorrect. C is correct. D is incorrect.
    A: A seems right: the plate has to be washed before it can be put in the rack.
    D: She has finished with the plates. The most sensible thing to do now is turning the tap off.
    B: Options A and C can be ruled out. Between B and D, B is more probable since the sponge is dirty and the water runs.
    """),
    (("dig hole in soil", "pick up shovel", "water the plants", "plant seedling", "pull out weeds"), r"""
    E: The gardener looks at the bed, full of weeds. The answer is E.
    B: In order to dig a hole in the soil, the person must first pick up the shovel. So the next action is B. pick up shovel.
    D: The hole is there already and the seedling stands beside it. Next she would plant the seedling, then water the plants.
    E: Well, digging a hole (A) is done, the shovel (B) is in the hand, watering (C) comes at the very end and there is no
        seedling to plant (D). That leaves E.
    C: The seedlings have been planted and the soil looks dry. Hmm, A? No. D? No, that was done. C it is.
    A: the man he have the shovel in hand. soil is flat. so he will digging the hole in soil. answer is a hole, option A
    """),
    (("fold the shirt", "iron the shirt"), r"""
    A: The shirt is smooth and warm, so the ironing is done. The person now folds the shirt.
    B: The person has spread the shirt on the board and the iron is hot. It is more likely that they iron the shirt than that
        they fold the shirt.
    B: Option B is the correct choice. Folding the shirt (A) comes after it has been ironed.
    -: I cannot determine from the video which of the two actions the person performs.
    """),
    (("shuffle cards", "deal cards", "look at cards"), r"""
    B: The deck has been shuffled twice. Now the dealer should deal the cards to the players, so that they can look at them.
    C: Everyone has got his cards. I'd go with C.
    A: The cards have just been collected from the table. Before dealing them, one shuffles the cards. So the answer is A.
    """),
    (("a man in a red shirt", "a dog", "a woman with a red hat", "two children"), r"""
    C: After the subtitle, the camera moves to the left, where a woman with a red hat is standing.
    A: A man enters the room first. He wears red, a shirt and not a hat. So the person is a man in a red shirt.
    B: A woman with a red hat walks past, then two children run by. The first one to appear after the title is a dog. The
        correct answer is B.
    """),
    (("tighten bolt with wrench", "pick up wrench", "remove wheel", "pump up tyre"), r"""
    B: The wrench is still lying on the bench, so it cannot be A. The mechanic has to pick up the wrench before he can tighten
        the bolt with it.
    D: The tyre is flat -> pump up tyre -> D
    C: <think>All the bolts have been loosened. The wheel can now be removed.
    """),
]

# The same for whole completions: what is concluded and whether it agrees with the answer.
OPTIONS = ("grab onion", "cut onion", "open drawer", "take knife")
COMPLETIONS = [
    ("B", 1, "<think>The next action is B.</think><answer>B</answer>"),
    ("B", 0, "<think>The next action is B.</think><answer>C</answer>"),
    ("B", 1, "<think>She holds the knife over it. Next is to cut the onion.</think>\n<answer>cut onion</answer>"),
    ("B", 1, "<think>So it is B.</think> <answer>B. cut onion</answer>"),
    ("B", 0, "<think>So it is B."),  # cut off before it answers
    ("B", 0, "<think>So it is B.</think>"),
    ("B", 0, "<think>So it is B.</think><answer>either B or C</answer>"),
    (None, 0, "<think></think><answer>A</answer>"),
    (None, 0, "<think>\n\n</think>\n<answer>A</answer>"),
    (None, 0, "<answer>A</answer>"),
    (None, 0, ""),
    (None, 0, "A"),
    ("D", 1, "The knife is missing, so the answer is D.\n<answer>D</answer>"),  # no think block: the text is the reasoning
    ("D", 1, "The knife is missing, so the answer is D.</think>\n<answer>D</answer>"),
    ("D", 1, "<think>The knife is missing, so the answer is D.\n<answer>D</answer>"),
    ("C", 0, "<think>All drawers are closed, so he opens the drawer.</think><answer>D</answer>"),
    (None, 0, "<think>Let me watch the video again.</think><answer>C</answer>"),
]

# Steps done, options, and texts: how many steps they name as done, in order; +1: and one option that was not done.
PROCESSES = [
    (("open drawer", "take knife", "cut onion into pieces"), ("wash knife", "put onion in pan", "peel potato", "open tap"), r"""
    3: The person opened the drawer, took the knife, and cut the onion into pieces. The next step is to put the onion in the
        pan. So the answer is B.
    3: So far, the following steps have been completed:\n1. Open drawer\n2. Take knife\n3. Cut onion into pieces\n\nThe next
        step would be B.
    3: - The person opens the drawer.\n- The person takes a knife.\n- The person cuts an onion into small pieces.
    3: In the video I can see the drawer being opened, a knife being taken and an onion being cut into pieces.
    2: First a drawer is opened and then a knife is taken out of it. I cannot see more.
    1: The person has opened the drawer. They have not taken the knife yet.
    1: The drawer was opened. The next action is to take the knife.
    1: She cut the onion into pieces, and before that nothing is visible.
    0: The video shows a kitchen with a counter, some vegetables and a person with an apron.
    0: The person will open the drawer, take the knife and cut the onion into pieces.
    0: To make a soup one needs to open the drawer, take the knife and cut the onion into pieces.
    0: The options are:\nA. wash knife\nB. put onion in pan\nC. peel potato\nD. open tap\nI think that B is right.
    3 +1: The person opened the drawer, took the knife, cut the onion into pieces and put the onion in the pan. So B is done.
    2 +1: The person opened the drawer, peeled a potato and took the knife.
    3 +2: person open drawer, take knife, cut onion into pieces, wash the knife, put the onion in the pan.
    0 +1: He peeled the potato. So next is A.
    2: The person cut the onion into pieces, opened the drawer and took the knife.
    1: He cuts the onion into pieces. After that he opens the drawer.
    3: Opening the drawer, taking the knife and cutting the onion into pieces were all done, so washing the knife is next.
    2: The knife was taken and the onion was cut into pieces, without washing the knife.
    3: the person open the drawer then he take the knife and he cutted onion in pieces now he should wash knife
    3: The video starts with the person who opens the drawer of the kitchen. Next, he takes a sharp knife from it. Then, he
        cuts the onion into pieces on the board. He is about to put the onion in the pan.
    2: The person has already opened the drawer and has the onion cut into pieces. Option D, open tap, does not fit, and
        option A, wash knife, comes later.
    3: <think>The drawer has been opened, the knife has been taken, and the onion has been cut into pieces.
    0: <think>Let me see.</think><answer>open drawer, take knife, cut onion into pieces</answer>
    3: The drawer has been opened, the knife has been taken, and the onion has been cut into pieces, but the tap has not been
        opened and no potato has been peeled.
    2: The person opens the drawer and takes the knife. If he had cut the onion into pieces, it would be in the pan.
    """),
    (("#C C washes the pot with water", "#C C puts the pot on the stove", "#C C opens the fridge"),
     ("pick up egg", "close fridge", "turn on stove", "wash pot"), r"""
    3: C washes the pot with water, puts the pot on the stove and opens the fridge. The next step is to pick up an egg.
    3: The person washed the pot using water, put it on the stove, and then opened the fridge.
    2: The person put a pot on the stove. Then the person opened the fridge. An egg is needed now.
    1: The fridge has been opened by the person, and now they can pick up the egg.
    3: The camera wearer washes a pot. He puts the pot on the stove. He opens the fridge.
    3 +1: The pot was washed with water and put on the stove, the fridge was opened and then closed again.
    3 +1: C washes the pot with water. C puts the pot on the stove. C opens the fridge. C picks up an egg. The answer is B.
    """),
    (("take cup", "wash cup", "take cup", "fill cup"), ("drink tea", "take tea bag", "pour milk", "open cupboard"), r"""
    4: The person takes a cup, washes the cup, takes the cup again and fills the cup.
    3: The person takes a cup, washes the cup and fills the cup.
    2: The person takes the cup twice.
    4: First, a cup is taken. Second, the cup is washed. Third, the cup is taken again. Fourth, the cup is filled. So now a tea
        bag is needed, and the answer is B.
    1: A cup is being washed.
    2: The person washes the cup and then fills the cup. I expect that she takes a tea bag next.
    3 +1: Take cup, wash cup, take tea bag, fill cup.
    """),
    (("pick up brush", "dip brush in paint", "paint wall"), ("wipe hands", "open can of paint", "move ladder"), r"""
    3: The man picks up the brush, dips the brush in the paint and paints the wall.
    3: He picked the brush up, dipped it into the paint and painted the wall. Next he will move the ladder.
    2: The painter has dipped his brush in the paint and has painted part of the wall.
    1: A brush was picked up. The wall has not been painted and the brush is dry.
    3: The brush has been picked up and dipped in the paint, and the wall has been painted.
    2 +1: He opened the can of paint, dipped the brush in paint and painted the wall.
    """),
    (("put dough in bowl",), ("knead dough", "add flour"), r"""
    1: The dough was put in a bowl.
    1: There is dough in the bowl, which the woman has just put there. So she will knead the dough.
    0: The bowl is empty.
    0: The dough should be put in the bowl before it is kneaded.
    """),
]
